"""Qwen2-VL in vLLM."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_vl as host
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..facts import VllmQwen2VL
from ..processor import ImagesOnly, KeptTokensProcessor
from ..pruned_model import PrunedMRopeModel


class Qwen2VLInfo(ImagesOnly, host.Qwen2VLProcessingInfo):
    """What vLLM asks about the model's prompts."""


class Qwen2VLProcessor(KeptTokensProcessor, host.Qwen2VLMultiModalProcessor):
    """Prepares prompts."""

    family = VllmQwen2VL


@MULTIMODAL_REGISTRY.register_processor(Qwen2VLProcessor, info=Qwen2VLInfo, dummy_inputs=host.Qwen2VLDummyInputsBuilder)
class PrunedQwen2VL(PrunedMRopeModel, host.Qwen2VLForConditionalGeneration):
    """The model."""

    family = VllmQwen2VL
