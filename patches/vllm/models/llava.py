"""LLaVA-1.5 in vLLM."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models import llava as host
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..facts import VllmLlava
from ..processor import ImagesOnly, KeptTokensProcessor
from ..pruned_model import PrunedModel
from .tower_names import with_tower_names


class LlavaInfo(ImagesOnly, host.LlavaProcessingInfo):
    """What vLLM asks about the model's prompts."""


class LlavaProcessor(KeptTokensProcessor, host.LlavaMultiModalProcessor):
    """Prepares prompts."""

    family = VllmLlava


def _info(context: Any) -> Any:
    # Models with a Pixtral tower have the same architecture and are vLLM's own.
    info = host._build_llava_or_pixtral_hf_info(context)
    return LlavaInfo(context) if isinstance(info, host.LlavaProcessingInfo) else info


def _processor(info: Any, dummy_inputs: Any) -> Any:
    if isinstance(info, LlavaInfo):
        return LlavaProcessor(info, dummy_inputs)
    return host._build_llava_or_pixtral_hf_processor(info, dummy_inputs)


@MULTIMODAL_REGISTRY.register_processor(_processor, info=_info, dummy_inputs=host.LlavaDummyInputsBuilder)
class PrunedLlava(PrunedModel, host.LlavaForConditionalGeneration):
    """The model."""

    family = VllmLlava
    hf_to_vllm_mapper = with_tower_names(host.LlavaForConditionalGeneration.hf_to_vllm_mapper)
