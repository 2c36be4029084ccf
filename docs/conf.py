"""Configuration of the documentation's generator (Sphinx)."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

project = "vlmprune"
author = "the vlmprune authors"
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "method_pages"]
html_theme = "furo"
html_title = "vlmprune"
exclude_patterns = ["generated/README.md"]
myst_enable_extensions = ["colon_fence"]
myst_heading_anchors = 4
# Docstrings put code between single backticks.
default_role = "code"
napoleon_google_docstring = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autodoc_member_order = "bysource"
autodoc_typehints = "signature"
nitpicky = False
