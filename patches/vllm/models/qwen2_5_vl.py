"""Qwen2.5-VL in vLLM."""

from __future__ import annotations

from vllm.model_executor.models import qwen2_5_vl as host
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..facts import VllmQwen25VL
from ..processor import ImagesOnly, KeptTokensProcessor
from ..pruned_model import PrunedMRopeModel


class Qwen25VLInfo(ImagesOnly, host.Qwen2_5_VLProcessingInfo):
    """What vLLM asks about the model's prompts."""


class Qwen25VLProcessor(KeptTokensProcessor, host.Qwen2_5_VLMultiModalProcessor):
    """Prepares prompts."""

    family = VllmQwen25VL


@MULTIMODAL_REGISTRY.register_processor(
    Qwen25VLProcessor, info=Qwen25VLInfo, dummy_inputs=host.Qwen2_5_VLDummyInputsBuilder
)
class PrunedQwen25VL(PrunedMRopeModel, host.Qwen2_5_VLForConditionalGeneration):
    """The model."""

    family = VllmQwen25VL
