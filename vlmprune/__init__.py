"""Training-free visual token pruning and merging for HuggingFace vision-language models."""

from pathlib import Path

# In a source checkout `kernels/`, `patches/` and `eval/` lie beside this folder and not in it (a wheel has them inside).
# They have no `__init__.py`, so that the repository root never shadows the public package `kernels`.
if (_root := Path(__file__).resolve().parent.parent).joinpath("kernels", "segmented_topk.py").is_file():
    __path__.append(str(_root))

__version__ = "0.1.0"
