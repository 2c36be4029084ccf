"""A package with a method of one's own, written from templates."""

from __future__ import annotations

import re
from importlib.resources import files
from pathlib import Path
from string import Template

from vlmprune.errors import ParameterError, unknown
from vlmprune.methods.registry import method_names

SITES = ("input", "layer")


def write_package(name: str, site: str, folder: Path) -> list[Path]:
    """Write a package `vlmprune-NAME` that offers the method `name`, with a first rule to replace and tests that pass.

    Args:
        name: the method's name: lower-case words joined by underscores.
        site: "input" or "layer", where it acts.
        folder: where the package's folder is made.

    Returns:
        The files.

    Raises:
        ParameterError: the name is taken or cannot be one, or the package's folder exists.
        UnknownNameError: no template for that site.
    """
    if site not in SITES:
        raise unknown("site with a template", site, SITES)
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise ParameterError(f"{name!r} is no name for a method; allowed: lower-case words joined by underscores.")
    if name in method_names():
        raise ParameterError(f"There is a method {name!r} already; take another name.")
    distribution = f"vlmprune-{name.replace('_', '-')}"
    package, target = f"vlmprune_{name}", folder / distribution
    if target.exists():
        raise ParameterError(f"{str(target)!r} exists; nothing is overwritten.")
    words = {
        "name": name,
        "class_name": "".join(word.capitalize() for word in name.split("_")),
        "package": package,
        "distribution": distribution,
    }
    sources = {
        target / "pyproject.toml": "pyproject.toml.txt",
        target / "README.md": "README.md.txt",
        target / package / f"{name}.py": f"{site}.py.txt",
        target / "tests" / f"test_{name}.py": "test.py.txt",
    }
    for path, source in sources.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(Template(template(source)).substitute(words), encoding="utf-8")
    initial = target / package / "__init__.py"
    initial.write_text("", encoding="utf-8")
    return [*sources, initial]


def template(name: str) -> str:
    """Return the text of a template."""
    return files("vlmprune.new_method").joinpath("templates", name).read_text(encoding="utf-8")
