"""What a model class is built of, found by looking at it: the modules and arguments that pruning its visual tokens relies on."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

from torch import nn

from ..calls import PIXELS

_DECODERS = ("language_model", "text_model", "llm")
_MODALITIES = ("image", "video")
_ENTRY = ("inputs_embeds", "attention_mask", "position_ids", "past_key_values")


@dataclass(frozen=True)
class ModelShape:
    """The parts of a vision-language model.

    Attributes:
        multimodal_path: from the model to the module that merges image features into the embeddings; "" is the model itself.
        language_path: from that module to its decoder.
        modalities: what it encodes, of "image" and "video".
        mrope: whether the multimodal module makes 3-D positions.
        missing: the needed facts that were not found, each in words; the other attributes say nothing where there are some.
    """

    multimodal_path: str = ""
    language_path: str = ""
    modalities: tuple[str, ...] = ()
    mrope: bool = False
    missing: tuple[str, ...] = ()


def read_shape(model: nn.Module) -> ModelShape:
    """Return what `model` is built of.

    Served are classes that encode images with `get_image_features`, write the features into the embeddings at the columns of a
    placeholder id, and call one decoder with them.
    """
    config: Any = model.config
    missing = []
    if getattr(config, "is_encoder_decoder", False):
        missing.append("one decoder that reads text and images (it is an encoder-decoder)")
    path = _multimodal_path(model)
    if path is None:
        missing.append("a `get_image_features` whose features a module with a decoder takes" + _instead(model))
        return ModelShape(missing=tuple(missing))
    multimodal = model.get_submodule(path)
    formers = [name for name, child in multimodal.named_children() if "qformer" in type(child).__name__.lower()]
    if formers:
        missing.append(
            f"visual tokens that stand for places of the image (they are outputs of the Q-Former `{formers[0]}`)"
        )
    decoder = _decoder_path(multimodal)
    if decoder is None:
        missing.append(
            f"a decoder that {type(multimodal).__name__} calls with inputs_embeds, attention_mask, position_ids and "
            "past_key_values, under one of the names " + ", ".join(f"`{name}`" for name in _DECODERS)
        )
    if not isinstance(getattr(config, "image_token_id", None), int):
        missing.append("a placeholder id (`config.image_token_id`)")
    taken = inspect.signature(type(multimodal).forward).parameters
    if PIXELS["image"] not in taken:
        missing.append(f"an argument {PIXELS['image']!r} of {type(multimodal).__name__}.forward")
    if missing:
        return ModelShape(missing=tuple(missing))
    modalities = tuple(
        name
        for name in _MODALITIES
        if PIXELS[name] in taken
        and isinstance(getattr(config, f"{name}_token_id", None), int)
        and hasattr(multimodal, f"get_{name}_features")
    )
    section = (getattr(config.get_text_config(), "rope_parameters", None) or {}).get("mrope_section") or ()
    if len(section) > 3:
        return ModelShape(
            missing=(f"positions of one axis or three (`mrope_section` splits heads over {len(section)})",)
        )
    mrope = any(hasattr(multimodal, name) for name in ("get_rope_index", "compute_3d_position_ids"))
    return ModelShape(path, decoder or "", modalities, mrope)


def _multimodal_path(model: nn.Module) -> str | None:
    """Return where the module is that encodes images and calls a decoder: inside the model, or the model itself."""
    for path in ("model", ""):
        module = model.get_submodule(path) if not path or hasattr(model, path) else None
        if module is not None and hasattr(module, "get_image_features") and hasattr(module, "get_input_embeddings"):
            return path
    return None


def _decoder_path(multimodal: nn.Module) -> str | None:
    for name in _DECODERS:
        child = getattr(multimodal, name, None)
        if not isinstance(child, nn.Module):
            continue
        # A causal language model, head included, around the decoder.
        inner = getattr(child, "model", None)
        path, decoder = (f"{name}.model", inner) if isinstance(inner, nn.Module) else (name, child)
        taken = inspect.signature(type(decoder).forward).parameters
        if all(argument in taken for argument in _ENTRY):
            return path
    return None


def _instead(model: nn.Module) -> str:
    """Say how images enter the model where they do it in another way, as far as its arguments tell."""
    for name, module in model.named_modules():
        taken = inspect.signature(type(module).forward).parameters
        crossing = [argument for argument in ("cross_attention_states", "encoder_hidden_states") if argument in taken]
        if crossing and "input_ids" in taken:
            return f" (images enter `{name or type(module).__name__}` by cross attention, as {crossing[0]!r})"
    return ""
