"""Which family serves which model class."""

from __future__ import annotations

from torch import nn

from vlmprune.errors import UnsupportedFamilyError, nearest

from .family import Family
from .llava import Llava
from .llava_next import LlavaNext
from .llava_onevision import LlavaOnevision
from .qwen2_5_vl import Qwen25VL
from .qwen2_vl import Qwen2VL
from .qwen3_vl import Qwen3VL
from .vip_llava import VipLlava

FAMILIES: tuple[type[Family], ...] = (Llava, VipLlava, LlavaNext, LlavaOnevision, Qwen2VL, Qwen25VL, Qwen3VL)


def find_family(model: nn.Module) -> Family:
    """Return the adapter of the model's family, found by the names of its class and base classes.

    Raises:
        UnsupportedFamilyError: names the supported classes and the nearest one.
    """
    names = [cls.__name__ for cls in type(model).__mro__]
    for family in FAMILIES:
        if any(name in family.model_classes for name in names):
            return family(model)
    supported = [name for family in FAMILIES for name in family.model_classes]
    match = nearest(names[0], [name.lower() for name in supported])
    hint = next((f" The nearest is {name}." for name in supported if name.lower() == match), "")
    raise UnsupportedFamilyError(f"{names[0]} is of no supported family.{hint} Supported: {', '.join(supported)}.")
