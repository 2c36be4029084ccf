"""Cases of CrossGET's match and ensemble."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.encoder.crossget_match import (
    attention_importance,
    complete_graph_match,
    ensemble,
    ensemble_weights,
    query_importance,
)


def crossget(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One reduction, with the importance of the variant."""
    importance = None
    if params["variant"] == "llava":
        importance = attention_importance(inputs["attn_mean"])
    elif params["variant"] == "clip":
        importance = query_importance(inputs["key"], inputs["query"])
    match = complete_graph_match(inputs["key"], importance, params["r"])
    weights = ensemble_weights(match, importance)
    sizes = inputs["size_in"][..., 0] if "size_in" in inputs else None
    tokens, size_out = ensemble(inputs["x"], sizes, match, weights)
    results = {
        "src_idx": match.sources,
        "dst_all_idx": match.rest,
        "dst_idx": match.partners,
        "kept_positions": match.kept,
        "weight": weights,
        "x_out": tokens,
        "size_out": size_out[..., None],
    }
    return results if importance is None else {**results, "importance": importance}


RUNS = {"crossget": crossget}
