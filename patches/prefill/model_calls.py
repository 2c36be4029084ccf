"""What is read of a forward of the multimodal model before it runs."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError

from ..calls import PIXELS, ModelCall
from ..families.family import Family
from ..tracing import break_graph


def read_model_call(family: Family, call: ModelCall, parameters: Collection[str]) -> None:
    """Find the images or videos of a call and their placeholders.

    Args:
        family: the model's adapter.
        call: the forward that begins; `encoded`, `visual_mask` and `attention_mask` are set.
        parameters: names of the arguments that the model takes.

    Raises:
        UnsupportedCallError: encoded features for a version of the host that would not read them.
    """
    inputs = call.inputs
    given = inputs.get("mm_encoder_outputs") or {}
    if not given and all(inputs.get(name) is None for name in PIXELS.values()):
        return
    if given and "mm_encoder_outputs" not in parameters:
        raise UnsupportedCallError(
            f"mm_encoder_outputs was given; {type(family.multimodal_model).__name__} of transformers "
            f"{transformers.__version__} takes none and would go on without the images. Pass the pixels."
        )
    call.encoded = {name: given[name] for name in family.modalities if given.get(name) is not None}
    present = [name for name in family.modalities if name in call.encoded or inputs.get(PIXELS[name]) is not None]
    others = [name for modality, name in PIXELS.items() if modality not in family.modalities and name in parameters]
    unserved = [name for name in others if inputs.get(name) is not None]
    if unserved:
        raise UnsupportedCallError(
            f"{unserved[0]} was given, and of {family.name} models vlmprune serves {' and '.join(family.modalities)} tokens "
            "only; allowed: calls without it."
        )
    if not present:
        return
    break_graph()
    call.modality_masks = {name: _placeholders(family, inputs, name).cpu() for name in present}
    call.visual_mask = torch.stack([*call.modality_masks.values()]).any(0)
    call.read_mask(inputs.get("attention_mask"))


def check_no_replica(module: nn.Module) -> None:
    """Raise UnsupportedCallError in a copy that DataParallel made of the model."""
    if module.__dict__.get("_is_replica", False):
        raise UnsupportedCallError(
            "DataParallel copies the model to several devices, and the copies share one set of hooks. "
            "Use one device, or DistributedDataParallel."
        )


def _placeholders(family: Family, inputs: Mapping[str, Any], modality: str) -> Tensor:
    placeholder = family.placeholder_id(modality)
    if inputs.get("input_ids") is not None:
        ids: Tensor = inputs["input_ids"]
        return ids == placeholder
    embeddings = inputs["inputs_embeds"]
    token = torch.tensor(placeholder, device=embeddings.device)
    return (embeddings == family.multimodal_model.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]
