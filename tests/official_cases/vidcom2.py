"""Cases of VidCom2: the official budgets per frame, and the exact budget of vLLM's port."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from official_cases.batches import make_batch
from official_cases.input_site import Tensors
from vlmprune.layout import raster_layout
from vlmprune.methods import VidCom2
from vlmprune.methods.video.vidcom2 import frame_counts, frame_scales, steady_channels, vidcom2_scores


def vidcom2(params: Mapping[str, Any], inputs: Tensors) -> Tensors:
    """The kept tokens of one video with what they were chosen by."""
    frames, rows, columns = params["T"], params["h"], params["w"]
    if len(inputs["features"]) == frames * rows * (columns + 1):
        return rows_with_newlines(params, inputs["features"])
    layout = raster_layout(rows, columns, frames)
    exact = "vllm" in str(params.get("variant", "")) or ("q" in params and "base_scale" not in params)
    share = float(params["keep"] if "keep" in params else params.get("base_scale", 1 - params.get("q", 0)))
    method = VidCom2(keep=share, faithful=not exact, rounding="down")
    video = inputs["features"].view(frames, rows * columns, -1)
    scores = vidcom2_scores(video)
    counts = frame_counts(scores.video, share)
    kept = method.select(make_batch(method, [layout], inputs["features"], video=True)).kept
    return {
        "kept": kept,
        "per_frame": torch.bincount(kept // (rows * columns), minlength=frames),
        "channels": steady_channels(video),
        "video_score": scores.video,
        "frame_score": scores.frame,
        "scales": frame_scales(scores.video, share),
        "before_reconcile": counts.sum()[None],
        "target": torch.tensor([method.video_budget(frames, rows * columns)]),
    }


def rows_with_newlines(params: Mapping[str, Any], features: torch.Tensor) -> Tensors:
    """A video of LLaVA-Video, with a newline behind every row: kept tokens of a frame, then all of its newlines."""
    frames, rows, columns = params["T"], params["h"], params["w"]
    planes = torch.arange(len(features)).view(frames, rows, columns + 1)
    patches, newlines = planes[..., :-1].flatten(1), planes[..., -1]
    results = vidcom2(params, {"features": features[patches.flatten()]})
    mask = torch.zeros(patches.numel(), dtype=torch.bool).index_fill(0, results["kept"], True).view(frames, -1)
    order = torch.cat([torch.cat([patches[frame][mask[frame]], newlines[frame]]) for frame in range(frames)])
    return {**results, "kept_with_newlines": order, "order": order, "output": features[order]}


RUNS = {"vidcom2": vidcom2}
