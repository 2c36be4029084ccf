"""Cases of Zero-TPrune's pruning layer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.encoder.zero_tprune_graph import complement, most_redundant, top_votes, weighted_votes


def zero_tprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Attention of one image, as queries and keys are made that give just this attention."""
    attention, key = inputs["attn"], inputs["key"]
    batch, heads, tokens, _ = attention.shape
    query = attention.clamp(min=torch.finfo(torch.float32).tiny).log().transpose(1, 2)
    every = torch.eye(tokens)[None, :, None].expand(batch, tokens, heads, tokens)
    class_token, bounds = params["class_token"], (params["vmin"], params["vmax"])
    boost = params["cls_boost"]
    before = weighted_votes(query, every, 1, scale=1.0, boost_first=boost, variance=bounds)
    redundant = most_redundant(before.importance, key, params["prune_S"], class_token)
    left = complement(redundant.dropped, tokens)
    at_left = left[..., None, None].expand(-1, -1, heads, tokens)
    votes = weighted_votes(
        query.gather(1, at_left),
        every.gather(1, at_left),
        params["iters"],
        scale=1.0,
        boost_first=boost,
        variance=bounds,
    )
    kept = left.gather(1, top_votes(votes.importance, params["keep_I"], class_token))
    return {
        "head_var_pre": before.variance,
        "imp_pre": before.importance,
        "group_A": redundant.group_a[0],
        "group_B": redundant.group_b[0],
        "best_match": redundant.partners[0],
        "best_sim": redundant.cosines[0],
        "dropped_S": redundant.dropped[0],
        "after_S": left[0],
        "head_var_I": votes.variance,
        "head_mask_I": votes.used.float(),
        "imp_I": votes.importance,
        "kept": kept[0],
    }


RUNS = {"zero_tprune": zero_tprune}
