"""Cases of MMTok: the choice for one image, padding, the words of a question, the sequence of a LLaVA-NeXT image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.anyres import anyres_layout
from official_cases.input_site import Tensors, tile_and_token
from vlmprune.methods.input.mmtok_coverage import coverage_order, coverage_rows, padding_patches
from vlmprune.methods.shared.words import keywords


def mmtok(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of any kind."""
    if "text_in" in params:
        return {"text_out": torch.tensor(list(keywords(params["text_in"]).encode()), dtype=torch.uint8)}
    if "width" in params:
        size = [int(params[name]) for name in ("width", "height", "target", "patch")]
        return {"pad_idx": padding_patches(*size), "pad_idx_overlap": padding_patches(*size, overlap=True)}
    if "tiles_wide" in params:
        return {"sequence": _sequence((params["tiles_high"], params["tiles_wide"]), inputs["keep_idx"])}
    tokens = inputs["vision_tokens"]
    excluded = torch.zeros(len(tokens), dtype=torch.bool)
    excluded[params.get("exclude") or []] = True
    rows = coverage_rows(
        tokens,
        inputs["vision_tokens_clip"],
        inputs["text_tokens"],
        float(params["alpha"]),
        float(params["tv_temp"]),
        float(params["vv_temp"]),
    )
    order = coverage_order(rows, min(params["K"], len(tokens)), excluded)
    return {"combined": rows, "pick_order": order, "keep_idx": order.sort().values}


def _sequence(crops: tuple[int, int], kept: Tensor) -> Tensor:
    layout = anyres_layout(crops, 24, 1, 1, unpad=False, newlines=False)
    tile, token = tile_and_token(layout).T
    chosen = torch.zeros(len(kept) + 1, 576, dtype=torch.bool)
    chosen[1:] = torch.zeros(len(kept), 576, dtype=torch.bool).scatter_(1, kept, True)
    return ((tile - 1) * 576 + token)[chosen[tile, token]]


RUNS = {"mmtok": mmtok}
