"""The architectures that are served, by their names in vLLM: facts and model class of each."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

from vlmprune.methods.input_method import InputMethod

from .facts import VllmFamily, VllmLlava, VllmLlavaNext, VllmLlavaOnevision, VllmQwen2VL, VllmQwen3VL, VllmQwen25VL
from .refusals import check_family


@dataclass(frozen=True)
class ServedModel:
    """One architecture.

    Attributes:
        family: its facts.
        model_class: module and class that vLLM loads when it builds the model.
    """

    family: type[VllmFamily]
    model_class: str

    def check(self, method: InputMethod, config: Any) -> None:
        """Check a method by the configuration of a model.

        Raises:
            UnsupportedFamilyError: the model's vision tower is not served.
            UnsupportedMethodError: the model does not meet the needs of the method.
        """
        family = self.family(SimpleNamespace(config=config))  # type: ignore[arg-type]
        family.check_tower_kind()
        check_family(method, family)


def _served(family: type[VllmFamily], name: str) -> ServedModel:
    return ServedModel(family, f"vlmprune.patches.vllm.models.{name}")


SERVED_MODELS: dict[str, ServedModel] = {
    "LlavaForConditionalGeneration": _served(VllmLlava, "llava:PrunedLlava"),
    "LlavaNextForConditionalGeneration": _served(VllmLlavaNext, "llava_next:PrunedLlavaNext"),
    "LlavaOnevisionForConditionalGeneration": _served(VllmLlavaOnevision, "llava_onevision:PrunedLlavaOnevision"),
    "Qwen2VLForConditionalGeneration": _served(VllmQwen2VL, "qwen2_vl:PrunedQwen2VL"),
    "Qwen2_5_VLForConditionalGeneration": _served(VllmQwen25VL, "qwen2_5_vl:PrunedQwen25VL"),
    "Qwen3VLForConditionalGeneration": _served(VllmQwen3VL, "qwen3_vl:PrunedQwen3VL"),
}
