"""Cases of FlashVID: what enters the language model, and the cut inside it."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.layer.fastv import fastv_count, fastv_keep
from vlmprune.methods.video.flashvid import FlashVID
from vlmprune.methods.video.flashvid_tree import flashvid_segments

PICKINGS = {
    "attn_div": "attention_diversity",
    "attn_div_v2": "attention_diversity_relevance",
    "div": "diversity",
    "attn": "attention",
}


def flashvid(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of one of the two stages."""
    return (_inner if params.get("part") == "inner" else _outer)(params, inputs)


def _outer(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    features, attention = inputs["features"].float(), inputs["attn"].float()
    frames, tokens, _ = features.shape
    share = ceil(tokens * params["retention_ratio"] * params["expansion"])
    method = FlashVID(
        keep=share * frames,
        alpha=params["alpha"],
        temporal_threshold=params["temporal_threshold"],
        segment_threshold=params["segment_threshold"] if params["do_segment"] else None,
        min_segments=params["min_segment_num"],
        complementary=params["complementary_segment"],
        picking=PICKINGS[params["token_selection_method"]],
        faithful=True,
    )
    assert method.picking is not None
    lengths = flashvid_segments(features, method.segment_threshold, method.min_segments or 1, method.complementary)
    plan = method.plan(frames, tokens, share * frames)
    picked, centres, values, _ = method.official_rows(features, attention, lengths, plan, method.picking)
    kept = torch.cat([picked, centres])
    order = kept.argsort(stable=True)
    rows = torch.cat([features.flatten(0, 1)[picked], values])
    return {
        "segments": torch.tensor(lengths),
        "adts": (picked % tokens).view(frames, -1),
        "keep": kept[order],
        "output": rows[order],
    }


def _inner(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    visual = inputs["visual_mask"].bool()
    scores = inputs["attn_last"].float().mean(0)[visual]
    count = fastv_count(len(scores), 1 - params["llm_retention_ratio"], "ceil")
    kept = visual.nonzero().flatten()[fastv_keep(scores, (0, len(scores)), (count,))]
    keep = torch.cat([(~visual).nonzero().flatten(), kept]).sort().values
    return {"keep": keep, "kept_position_ids": inputs["position_ids"][..., keep]}


RUNS = {"flashvid": flashvid}
