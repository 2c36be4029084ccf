"""LLaVA-OneVision in vLLM."""

from __future__ import annotations

from vllm.model_executor.models import llava_onevision as host
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..facts import VllmLlavaOnevision
from ..processor import ImagesOnly, KeptTokensProcessor
from ..pruned_model import PrunedModel
from .tower_names import with_tower_names


class LlavaOnevisionInfo(ImagesOnly, host.LlavaOnevisionProcessingInfo):
    """What vLLM asks about the model's prompts."""


class LlavaOnevisionProcessor(KeptTokensProcessor, host.LlavaOnevisionMultiModalProcessor):
    """Prepares prompts."""

    family = VllmLlavaOnevision


@MULTIMODAL_REGISTRY.register_processor(
    LlavaOnevisionProcessor, info=LlavaOnevisionInfo, dummy_inputs=host.LlavaOnevisionDummyInputsBuilder
)
class PrunedLlavaOnevision(PrunedModel, host.LlavaOnevisionForConditionalGeneration):
    """The model."""

    family = VllmLlavaOnevision
    encoder_inputs = ("image_sizes",)
    hf_to_vllm_mapper = with_tower_names(host.LlavaOnevisionForConditionalGeneration.hf_to_vllm_mapper)
