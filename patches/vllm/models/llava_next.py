"""LLaVA-NeXT in vLLM."""

from __future__ import annotations

from vllm.model_executor.models import llava_next as host
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..facts import VllmLlavaNext
from ..processor import ImagesOnly, KeptTokensProcessor
from ..pruned_model import PrunedModel
from .tower_names import with_tower_names


class LlavaNextInfo(ImagesOnly, host.LlavaNextProcessingInfo):
    """What vLLM asks about the model's prompts."""


class LlavaNextProcessor(KeptTokensProcessor, host.LlavaNextMultiModalProcessor):
    """Prepares prompts."""

    family = VllmLlavaNext


@MULTIMODAL_REGISTRY.register_processor(
    LlavaNextProcessor, info=LlavaNextInfo, dummy_inputs=host.LlavaDummyInputsBuilder
)
class PrunedLlavaNext(PrunedModel, host.LlavaNextForConditionalGeneration):
    """The model."""

    family = VllmLlavaNext
    encoder_inputs = ("image_sizes",)
    hf_to_vllm_mapper = with_tower_names(host.LlavaNextForConditionalGeneration.hf_to_vllm_mapper)
