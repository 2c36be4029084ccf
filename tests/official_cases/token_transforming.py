"""Cases of the soft merge that stands for Token Transforming."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.encoder.token_transforming_matrix import soft_merge, top_targets, transformation


def token_transforming(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Targets by the scores, the matrix, and what it makes."""
    class_token, tokens = params["class_token"], inputs["x"]
    sizes = inputs["size_in"][..., 0] if "size_in" in inputs else None
    targets = top_targets(inputs["score"], params["M"], class_token)
    matrix = transformation(
        tokens, sizes, targets, params["tau"], params["mode"], params.get("top_k"), class_token=class_token
    )
    merged, size_out = soft_merge(tokens, sizes, matrix, params["mode"], class_token)
    return {"target_idx": targets, "W": matrix, "x_out": merged, "size_out": size_out[..., None]}


RUNS = {"token_transforming": token_transforming}
