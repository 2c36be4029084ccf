"""Names of the tensors of a vision tower in checkpoints of newer versions of transformers."""

from __future__ import annotations

from typing import Any

from vllm.model_executor.models.utils import WeightsMapper

_PARTS = ("embeddings", "pre_layrnorm", "encoder", "post_layernorm", "head")


def with_tower_names(mapper: Any) -> Any:
    """Return a mapper that also knows CLIP and SigLIP towers without the `vision_model` that vLLM has between.

    transformers saves them so since its version 5, and reads both.
    """
    return mapper | WeightsMapper(
        orig_to_new_prefix={f"vision_tower.{part}": f"vision_tower.vision_model.{part}" for part in _PARTS}
    )
