"""Qwen3-VL in vLLM."""

from __future__ import annotations

from vllm.model_executor.models import qwen3_vl as host
from vllm.multimodal import MULTIMODAL_REGISTRY

from ..facts import VllmQwen3VL
from ..processor import ImagesOnly, KeptTokensProcessor
from ..pruned_model import PrunedMRopeModel


class Qwen3VLInfo(ImagesOnly, host.Qwen3VLProcessingInfo):
    """What vLLM asks about the model's prompts."""


class Qwen3VLProcessor(KeptTokensProcessor, host.Qwen3VLMultiModalProcessor):
    """Prepares prompts."""

    family = VllmQwen3VL


@MULTIMODAL_REGISTRY.register_processor(Qwen3VLProcessor, info=Qwen3VLInfo, dummy_inputs=host.Qwen3VLDummyInputsBuilder)
class PrunedQwen3VL(PrunedMRopeModel, host.Qwen3VLForConditionalGeneration):
    """The model."""

    family = VllmQwen3VL
