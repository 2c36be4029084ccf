"""The model inside what a script wraps around it: adapters, parallelism, compilation, pipelines."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

# Where wrappers keep what they wrap: torch.compile, FSDP, DDP and DataParallel (DeepSpeed, too), TRL's value heads, PEFT.
_ATTRIBUTES = ("_orig_mod", "_fsdp_wrapped_module", "module", "pretrained_model", "base_model", "model")

# Wrappers of single submodules, which stay in their place in the model.
_SUBMODULE_ATTRIBUTES = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")


def find_inside(model: Any, wanted: Callable[[Any], bool]) -> Any | None:
    """Return `model`, or the first module inside its wrappers, for which `wanted` is true; None if there is none.

    Args:
        model: a module, or an object that holds one under a name that wrappers use, as a transformers pipeline does.
        wanted: what is looked for.
    """
    level, seen = [model], {id(model)}
    while level:
        for item in level:
            if wanted(item):
                return item
        inner = [getattr(item, attribute, None) for item in level for attribute in _ATTRIBUTES]
        level = [item for item in inner if isinstance(item, nn.Module) and id(item) not in seen]
        seen.update(map(id, level))
    return None


def without_wrappers(module: nn.Module) -> nn.Module:
    """Return the submodule itself where FSDP, activation checkpointing or `torch.compile` wrapped it alone.

    Its methods are called on itself, past the wrapper, so that is where they must be replaced.
    """
    for attribute in _SUBMODULE_ATTRIBUTES:
        inner = module._modules.get(attribute)
        if inner is not None:
            return without_wrappers(inner)
    return module
