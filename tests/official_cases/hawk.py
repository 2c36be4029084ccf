"""Cases of HAWK: which tokens ask, and the ranking by projected queries and keys."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import make_batch, square_layout
from official_cases.input_site import Tensors
from vlmprune.methods.first_layer import FirstLayer, question_range
from vlmprune.methods.input.hawk import HAWK, hawk_scores


def hawk(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Which tokens ask, or the choice in one image."""
    if "input_ids" in inputs:
        ids, last = inputs["input_ids"].flatten().tolist(), int(inputs["visual_indices"].max())
        begin, end = question_range(ids, last, params["vision_end_token_id"], frozenset({params["im_end_token_id"]}))
        return {"query_indices": torch.arange(begin, end)}
    queries, keys = inputs["query"].transpose(0, 1), inputs["key"].transpose(0, 1)
    total, start, width = len(keys), params["start"], params["S"]
    weights, normalization = inputs["head_weights"], params["normalization"]
    scale = queries.shape[-1] ** -0.5
    method = HAWK(
        keep=float(params["keep_ratio"]),
        head_weights=weights.tolist(),
        normalization=normalization,
        rounding="ceil",
        min_visual_tokens=params["min_visual_tokens"],
    )
    layer = FirstLayer("a case", 1, len(weights), scale, queries=lambda _: queries, keys=lambda _: keys)
    batch = make_batch(method, [square_layout(total)], first_layer=layer, questions=(queries,))
    kept = method.select(batch).kept
    return {
        "scores": hawk_scores(queries, keys, weights, scale, normalization),
        "keep_visual": kept,
        "keep_all": torch.cat([torch.arange(start), start + kept, torch.arange(start + total, width)]),
    }


RUNS = {"hawk": hawk}
