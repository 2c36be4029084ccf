"""Cases of MCTF's fusion."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from official_cases.batches import CLIP
from official_cases.input_site import Tensors
from vlmprune.methods.encoder.mctf import MCTF
from vlmprune.methods.encoder.mctf_match import POOLINGS, criteria, two_way_match
from vlmprune.methods.encoder_method import BlockBatch


def mctf(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One fusion by the attention of the block's queries and keys."""
    query, key, tokens = inputs["q"], inputs["k"], inputs["x"]
    sizes = inputs["size_in"][..., 0] if "size_in" in inputs else None
    taus = {name: params[name] for name in ("tau_sim", "tau_info", "tau_size")}
    method = MCTF(
        r=params["r"],
        mode="one_step_ahead" if params["one_step_ahead"] == 1 else "after_block",
        bidirectional=bool(params["bidirection"]),
        pooling=POOLINGS[params["pooling_type"]],
        **taus,
    )
    # The attention of these cases has no sizes in it.
    block = BlockBatch(
        1, tokens, params["r"], CLIP, sizes=sizes, leading=params["num_protected"], scale=query.shape[-1] ** -0.5,
        query=query.transpose(1, 2), key=key.transpose(1, 2),
    )  # fmt: skip
    fusion = method.reduce(block)
    scores = criteria(tokens, block.attention.mean((1, 2)), sizes, **taus)
    match = two_way_match(scores, params["r"], params["num_protected"], method.bidirectional)
    assert fusion.sizes is not None
    results = {
        "src_idx": match.sources,
        "dst_idx": match.partners,
        "unm_idx": match.unmerged,
        "src_idx2": match.odd_sources,
        "dst_idx2": match.odd_partners,
        "unm_idx2": match.odd_unmerged,
        "x_out": fusion.values,
        "size_out": fusion.sizes[..., None],
    }
    if fusion.attention is not None:
        results["attn_out"] = fusion.attention
        results["attn_out_colmean"] = fusion.attention.mean(2)
        results["attn_out_rowsum"] = fusion.attention.sum(3)
    return results


RUNS = {"mctf": mctf}
