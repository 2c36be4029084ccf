"""Training-free visual token pruning and merging for HuggingFace vision-language models.

model = vlmprune.apply(model, method="divprune", keep=0.25)
out = model.generate(**inputs)
vlmprune.remove(model)
"""

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

# In a source checkout `kernels/`, `patches/` and `eval/` lie beside this folder and not in it (a wheel has them inside).
# They have no `__init__.py`, so that the repository root never shadows the public package `kernels`.
if (_root := Path(__file__).resolve().parent.parent).joinpath("kernels", "segmented_topk.py").is_file():
    __path__.append(str(_root))

if TYPE_CHECKING:
    from vlmprune.eval.tune.recommend import recommend
    from vlmprune.eval.tune.run import tune

    from . import errors, methods
    from .api import apply, describe, explain, last_run, list_methods, options, pruned, register_family, remove
    from .eval.pictures.plot import plot
    from .methods import AttentionMethod as AttentionMethod
    from .methods import InputMethod as InputMethod
    from .methods import LayerMethod as LayerMethod
    from .methods import Method as Method
    from .methods.attention import *  # noqa: F403
    from .methods.baselines import *  # noqa: F403
    from .methods.input import *  # noqa: F403
    from .methods.layer import *  # noqa: F403
    from .record import ImageRecord, RunRecord

__version__ = "0.1.0"
__all__ = [
    "ImageRecord",
    "RunRecord",
    "apply",
    "describe",
    "errors",
    "explain",
    "last_run",
    "list_methods",
    "methods",
    "options",
    "plot",
    "pruned",
    "recommend",
    "register_family",
    "remove",
    "tune",
]

_HOMES = {
    **dict.fromkeys(("apply", "describe", "explain", "last_run", "list_methods"), "vlmprune.api"),
    **dict.fromkeys(("options", "pruned", "register_family", "remove"), "vlmprune.api"),
    "plot": "vlmprune.eval.pictures.plot",
    **dict.fromkeys(("ImageRecord", "RunRecord"), "vlmprune.record"),
    "tune": "vlmprune.eval.tune.run",
    "recommend": "vlmprune.eval.tune.recommend",
}


def __getattr__(name: str) -> Any:
    # Lazy, so that `vlmprune --help` and `vlmprune.__version__` need not import torch.
    if name in ("errors", "methods"):
        return import_module(f"vlmprune.{name}")
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    from difflib import get_close_matches

    known = list(__all__)
    if name[:1].isupper():
        methods = import_module("vlmprune.methods")
        if name in methods.__all__:
            return getattr(methods, name)
        known += methods.__all__
    match = get_close_matches(name, known, n=1)
    raise AttributeError(
        f"module 'vlmprune' has no attribute {name!r}." + (f" Did you mean {match[0]!r}?" if match else "")
    )


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *import_module("vlmprune.methods").__all__})
