"""Cases of ToMe: one reduction, or its proportional attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import CLIP
from official_cases.input_site import Tensors
from vlmprune.methods.encoder.tome import ToMe, bipartite_soft_matching
from vlmprune.methods.encoder_method import BlockBatch
from vlmprune.methods.shared.merged_tokens import merge_tokens


def tome(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A reduction of `x` by `metric`, or attention with sizes."""
    if "q" in inputs:
        return _proportional_attention(params, inputs)
    metric, x = inputs["metric"], inputs["x"]
    class_token, distill_token = bool(params.get("class_token")), bool(params.get("distill_token"))
    asked = int(params.get("r_requested", params.get("r", 0)))
    match = bipartite_soft_matching(metric, asked, class_token, distill_token)
    sizes = inputs["size_in"][..., 0] if "size_in" in inputs else None
    outputs = match.targets.shape[1]
    if distill_token or outputs == x.shape[1]:
        values, merged_sizes = merge_tokens(x, match.groups, sizes, outputs)
        groups = match.groups
    else:
        batch = BlockBatch(
            block=0,
            hidden=x,
            remove=x.shape[1] - outputs,
            tower=CLIP,
            sizes=sizes,
            leading=int(class_token),
            key=metric[:, :, None],
        )
        reduction = ToMe(r=batch.remove).reduce(batch)
        assert reduction.sizes is not None
        values, merged_sizes, groups = reduction.values, reduction.sizes, reduction.groups
    return {
        "unm_idx": match.unmerged,
        "src_idx": match.sources,
        "dst_idx": match.destinations,
        "group_of_token": groups,
        "x_out": values,
        "x_out_mean": merge_tokens(x, groups, None, outputs)[0],
        "size_out": merged_sizes[..., None],
    }


def _proportional_attention(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    query, key, value, sizes = inputs["q"], inputs["k"], inputs["v"], inputs["size"][..., 0]
    batch = BlockBatch(
        block=0,
        hidden=value[:, 0],
        remove=0,
        tower=CLIP,
        sizes=sizes,
        key=key.transpose(1, 2),
        query=query.transpose(1, 2),
        scale=params["scale"],
        biased=ToMe().proportional,
    )
    bias = sizes.log()[:, None, None]
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, bias, scale=params["scale"])
    return {"attn": batch.attention, "out": out}


RUNS = {"tome": tome}
