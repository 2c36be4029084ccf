"""Cases of VAR, given by attention maps: queries, keys and values are made that give and return just these maps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.kernels.redistributed_attention import SINK, VALID, VISUAL, redistributed_attention
from vlmprune.methods.attention.var import VAR


def var(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Sinks of the prompt, the heads and rows that are told apart, and the maps after the change."""
    hidden, attention = inputs["hidden_states"], inputs["attn"]
    start, total = params["image_start"], params["image_len"]
    method = VAR(
        tau=float(params["tau"]),
        move_fraction=1 - params["p"],
        highest_share=params["rho_portion_max"],
        lowest_weight=params["summ_min"],
        dimensions=params["dim_sink"],
    )
    sinks = method.find_sinks(hidden, method.sink_dimensions(hidden[:, 0]))
    batch, heads, rows, keys = attention.shape
    flags = torch.full((batch, keys), VALID, dtype=torch.uint8)
    flags[:, start : start + total] |= VISUAL
    flags[:, : sinks.shape[1]] |= SINK * sinks.to(torch.uint8)
    query = attention.clamp(min=torch.finfo(torch.float32).tiny).log().transpose(1, 2)
    maps = torch.eye(keys)[None, :, None].expand(batch, keys, heads, keys)
    everything = torch.full((batch, rows), keys - 1)
    # Rows before the end of the image are told apart too, and left as they are.
    _, selected = redistributed_attention(
        query, maps, maps, flags, everything, moved=method.move_fraction, highest_share=method.highest_share,
        lowest_weight=method.lowest_weight, scale=1.0,
    )  # fmt: skip
    changed = everything
    if params["phase"] == "prefill":
        changed = torch.where(torch.arange(rows) >= start + total, everything, -1)
    delta = method.change(query, maps, maps, flags, changed, 1.0)
    return {
        "sink_idx": sinks[0].nonzero().flatten(),
        "coords": selected.transpose(1, 2).nonzero(),
        "attn_out": attention + delta.transpose(1, 2),
    }


RUNS = {"var": var}
