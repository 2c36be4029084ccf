"""Which family serves which model class and which configuration."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from vlmprune.errors import ParameterError, UnsupportedFamilyError, nearest, unknown
from vlmprune.plugins import load_plugins

from .family import Family
from .gemma3 import Gemma3
from .gemma4 import Gemma4
from .general import general_family, made_family
from .glm4v import Glm4v
from .idefics3 import Idefics3
from .internvl import InternVL
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo
from .llava_onevision import LlavaOnevision
from .mistral3 import Mistral3
from .paddleocr_vl import PaddleOCRVL
from .pixtral import LlavaPixtral
from .qwen2_5_vl import Qwen25VL
from .qwen2_vl import Qwen2VL
from .qwen3_5 import Qwen35
from .qwen3_vl import Qwen3VL
from .shape import ModelShape
from .vip_llava import VipLlava
from .wrappers import find_inside

FAMILIES: tuple[type[Family], ...] = (
    LlavaPixtral,
    Llava,
    VipLlava,
    LlavaNext,
    LlavaNextVideo,
    LlavaOnevision,
    Qwen2VL,
    Qwen25VL,
    Qwen3VL,
    Qwen35,
    InternVL,
    Idefics3,
    Glm4v,
    Gemma3,
    Gemma4,
    Mistral3,
    PaddleOCRVL,
)


REGISTERED: dict[str, type[Family]] = {}
"""Families that users registered, by the qualified name of the model class."""

ENTRY_POINTS = "vlmprune.families"
"""The group under which other packages offer families: `ModelClass = "package.module:Family"`."""

_OFFERED: dict[str, type[Family]] = {}


def register_family(
    model_class: type[nn.Module],
    family: type[Family] | None = None,
    *,
    multimodal_model: str = "model",
    language_model: str = "language_model",
    modalities: Sequence[str] = ("image",),
    mrope: bool = False,
) -> type[Family]:
    """Say how a class of your own, or of a repository with remote code, is built, so that methods can be applied to it.

    Args:
        model_class: the class of the whole model, `type(model)`.
        family: a family whose facts hold for it, one of vlmprune's or your own subclass; without it the facts below hold.
        multimodal_model: from the model to the module whose `get_image_features` encodes images (its output has them in
            `pooler_output`) and whose forward calls the decoder; names by dots, "" is the model itself.
        language_model: from that module to the decoder.
        modalities: what is encoded, of "image" and "video"; `config.image_token_id` is the placeholder.
        mrope: whether position ids are 3-D.

    Returns:
        The family, whose objects know one model each.

    Raises:
        ParameterError: `model_class` is no class of modules, or `family` no family.
    """
    if not (isinstance(model_class, type) and issubclass(model_class, nn.Module)):
        raise ParameterError(f"model_class={model_class!r} is no class of modules; allowed: type(model).")
    if family is None:
        cls: Any = model_class
        family = made_family(cls, ModelShape(multimodal_model, language_model, tuple(modalities), mrope))
    else:
        _check_family(family)
    REGISTERED[_qualified(model_class)] = family
    return family


def _check_family(family: object) -> None:
    if not (isinstance(family, type) and issubclass(family, Family)):
        raise ParameterError(f"family={family!r} is no family; allowed: subclasses of vlmprune's Family.")


def _offered() -> dict[str, type[Family]]:
    """Return the families that installed packages offer, by the names of model classes."""
    load_plugins(ENTRY_POINTS, "family of", _register_offered)
    return _OFFERED


def named_families() -> list[type[Family]]:
    """Return all families that name their classes: vlmprune's, those of installed packages, those that users registered."""
    return [*FAMILIES, *_offered().values(), *REGISTERED.values()]


def _register_offered(name: str, family: Any) -> None:
    _check_family(family)
    if name not in family.model_classes:
        raise ParameterError(
            f"model_classes={family.model_classes!r} of its {family.__qualname__} do not name that class; entry point and "
            "class must agree."
        )
    if any(name in own.model_classes for own in FAMILIES):
        raise ParameterError(
            "vlmprune serves the class of this name; for another of that name: vlmprune.register_family."
        )
    _OFFERED[name] = family


def find_vlm(model: Any) -> nn.Module:
    """Return the vision-language model itself, wherever it is in the wrappers of `model`.

    Args:
        model: the model, or one wrapped by PEFT, DDP, DataParallel, FSDP, `torch.compile`, accelerate or a pipeline.

    Raises:
        UnsupportedFamilyError: there is no model of a supported family inside; names the supported classes.
    """
    found = find_inside(model, lambda item: _family_of(item) is not None)
    if found is None:
        found = find_inside(model, _may_be_general)
    if found is None:
        supported = ", ".join(name for family in FAMILIES for name in family.model_classes)
        raise UnsupportedFamilyError(f"{_described(model)} Supported: {supported}.")
    return found


def find_family(model: Any) -> Family:
    """Return the adapter of the family of the model, or of the one inside its wrappers, by the names of classes.

    Raises:
        UnsupportedFamilyError: there is no model of a supported family inside; names the supported classes.
    """
    found = find_vlm(model)
    family = _family_of(found) or _general_of(found)
    return family(found)


def _family_of(model: Any) -> type[Family] | None:
    """Return the family that the class of a model is registered for, or that names it or a class that it derives from.

    A class that is only called as one of transformers' is not it: remote code has other modules under the same name.
    """
    for cls in type(model).__mro__:
        if _qualified(cls) in REGISTERED:
            return REGISTERED[_qualified(cls)]
        for family in FAMILIES:
            if cls.__name__ in family.model_classes and _of_transformers(cls) and family.fits(model.config):
                return family
        if issubclass(cls, nn.Module) and cls.__name__ in _offered():
            return _offered()[cls.__name__]
    return None


def _of_transformers(cls: type) -> bool:
    return cls.__module__.partition(".")[0] == "transformers"


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _may_be_general(model: object) -> bool:
    """Return whether a module is a whole model that generates and sees images, of a class that no family names."""
    if any(type(model).__name__ in family.model_classes for family in FAMILIES):
        return True
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        return False
    inner = getattr(model, "model", None)
    return any(hasattr(each, "get_image_features") for each in (model, inner)) or hasattr(model.config, "vision_config")


def _general_of(model: nn.Module) -> type[Family]:
    cls = type(model)
    alike = next((family for family in FAMILIES if cls.__name__ in family.model_classes), None)
    if alike is not None and not _of_transformers(cls):
        raise UnsupportedFamilyError(
            f"{cls.__module__}.{cls.__qualname__} is called as a class of {alike.name} in transformers, and is another. Where it "
            f"is built alike: vlmprune.register_family(type(model), {alike.__name__}), with vlmprune.patches.families; else "
            "register it with the facts that it is built by."
        )
    try:
        return general_family(model)
    except UnsupportedFamilyError as error:
        names = [name for family in FAMILIES for name in family.model_classes]
        match = nearest(type(model).__name__, names) or names[0]
        raise UnsupportedFamilyError(f"{error} Nearest class that is supported: {match}.") from None


def _described(model: object) -> str:
    """Say what is wrong with an object in which no supported model was found, and what of its kind is supported."""
    name = type(model).__name__
    if not isinstance(model, nn.Module) and not isinstance(getattr(model, "model", None), nn.Module):
        return f"{name!r} is no model, and has none inside."
    inner = find_inside(model, lambda item: isinstance(item, PreTrainedModel))
    what = name if inner is None or inner is model else f"{type(inner).__name__} in {name}"
    # The backbone of a supported family is called as the supported class but for the ending.
    stem = type(inner).__name__.removesuffix("Model")
    related = [
        cls
        for family in FAMILIES
        for cls in family.model_classes
        if cls.removesuffix("ForConditionalGeneration") == stem
    ]
    if related:
        return f"{what} is only a part: of this family the whole {related[0]} is supported."
    kind = f" (model type {inner.config.model_type!r})" if inner is not None else ""
    return f"{what} is of no supported family{kind}."


def family_of_config(config: PreTrainedConfig) -> type[Family]:
    """Return the family of the models that a configuration describes, found by its `model_type`.

    Raises:
        UnknownNameError: names the supported model types and the nearest one.
    """
    known = [*_offered().values(), *FAMILIES]
    families = {model_type: family for family in known for model_type in family.model_types}
    if config.model_type not in families:
        raise unknown("model type", config.model_type, families)
    return families[config.model_type]
