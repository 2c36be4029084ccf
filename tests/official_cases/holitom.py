"""Cases of HoliTom: what enters the language model, and the merging inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.layer.fastv import fastv_count, fastv_keep
from vlmprune.methods.layer.holitom_merge import plan_fold
from vlmprune.methods.video.holitom import HoliTom
from vlmprune.methods.video.holitom_windows import holitom_windows


def holitom(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of one of the two stages."""
    return (_inner if params.get("part") == "inner" else _outer)(params, inputs)


def _outer(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    features, attention = inputs["features"].float(), inputs["attn"].float()
    tokens = features.shape[1]
    if params.get("D_context_share"):
        raise ValueError("D_context_share > 0 crashes in the official code; there is no such mode here.")
    grid = params.get("newline") == "grid"
    method = HoliTom(
        keep=params["retain_ratio"],
        tau=params["tau"],
        beta=params["beta"],
        neighbours=params["K"],
        max_window=params["max_window"],
        order="position" if grid else "official",
        faithful=True,
    )
    windows = holitom_windows(features, method.tau, method.max_window)
    plan = method.plan(windows, tokens, params["retain_ratio"])
    rows = method.merge(features, attention, windows, plan)
    moving = torch.tensor(plan.moving).split(list(windows.lengths))
    results = {
        "windows": torch.tensor(
            [[end - length, end - 1] for length, end in zip(windows.lengths, _ends(windows.lengths), strict=True)]
        ),
        "static_count": windows.still.sum(1),
        "segment_len": torch.tensor(plan.still) + torch.stack([counts.sum() for counts in moving]),
        "total_reduced": torch.tensor([float(windows.saved)], dtype=torch.float64),
        "ratio": torch.tensor([plan.ratio], dtype=torch.float64),
        "output": rows.values,
    }
    if grid:
        row = rows.kept // params["w"]
        results["output"] = _with_newlines(row, rows.values, inputs["newline"].float())
        window = torch.repeat_interleave(torch.tensor(windows.lengths))
        results["segment_len"] += torch.bincount(window[row.unique() // params["h"]], minlength=len(windows.lengths))
    return results


def _ends(lengths: tuple[int, ...]) -> list[int]:
    ends: list[int] = torch.tensor(lengths).cumsum(0).tolist()
    return ends


def _with_newlines(grid_row: Tensor, values: Tensor, newline: Tensor) -> Tensor:
    """Put a newline behind every row of the grid that has a token, as LLaVA-Video does."""
    rows = []
    for value, row, following in zip(values, grid_row, [*grid_row[1:], torch.tensor(-1)], strict=True):
        rows += [value] if row == following else [value, newline.flatten()]
    return torch.stack(rows)


def _inner(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Tokens kept as by FastV; every other one goes into the kept one that it is most like."""
    start, total = params["start"], params["img"]
    hidden = inputs["hidden"].float()
    scores = inputs["attn_last"].float().mean(0)[start : start + total]
    count = fastv_count(total, params["r"])
    kept = fastv_keep(scores, (0, total), (count,))
    visual = hidden[start : start + total]
    merged = plan_fold(visual, kept, (total,), (count,)).merge(visual)
    before, after = torch.arange(start), torch.arange(start + total, len(hidden))
    return {
        "keep": torch.cat([before, start + kept, after]),
        "output": torch.cat([hidden[before], merged, hidden[after]]),
    }


RUNS = {"holitom": holitom}
