"""Cases of EVS: which tokens of one video stay, and the positions of a pruned prompt with videos."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from official_cases.batches import make_batch
from official_cases.input_site import Tensors
from official_cases.video_prompts import entering_positions, recomputed_positions
from vlmprune.layout import raster_layout
from vlmprune.methods import EVS
from vlmprune.methods.video.evs import evs_score


def evs_mask(params: Mapping[str, Any], features: torch.Tensor, **more: Any) -> torch.Tensor:
    """Which tokens of a video stay, bool `[frames * rows * columns]`."""
    share = params["keep"] if "keep" in params else 1 - params["q"]
    method = EVS(keep=min(1.0, float(share)), rounding="down", **more)
    frames, rows, columns = params["T"], params["h"], params["w"]
    layout = raster_layout(rows, columns, frames)
    batch = make_batch(method, [layout], features, video=True)
    return torch.zeros(layout.total, dtype=torch.bool).index_fill(0, method.select(batch).kept, True)


def evs_selection(params: Mapping[str, Any], inputs: Tensors) -> Tensors:
    """The retention mask of one video, as the official code makes it in the dtype of the features."""
    frames, tokens = params["T"], params["h"] * params["w"]
    in_half = params.get("dtype") == "bfloat16"
    features = inputs["features"].to(torch.bfloat16) if in_half else inputs["features"]
    mask = evs_mask(params, features, dtype="model")
    wide = evs_mask(params, features.float())
    return {
        "mask": mask.to(torch.uint8),
        "kept": mask.nonzero().flatten(),
        "count": mask.sum()[None],
        "per_frame": mask.view(frames, tokens).sum(1),
        "dissimilarity": evs_score(features.view(frames, tokens, -1), in_model_dtype=True),
        "kept_fp32": wide.nonzero().flatten(),
        "mask_fp32": wide.to(torch.uint8),
        "per_frame_fp32": wide.view(frames, tokens).sum(1),
        "count_fp32": wide.sum()[None],
    }


def evs(params: Mapping[str, Any], inputs: Tensors) -> Tensors:
    """A case of any kind."""
    if "input_ids" not in inputs:
        return evs_selection(params, inputs)
    if "mask" in inputs:
        return {**entering_positions(params, inputs, inputs["mask"]), **recomputed_positions(params, inputs)}
    mask = evs_mask(params, inputs["features"])
    return {**entering_positions(params, inputs, mask), "mask": mask.to(torch.uint8)}


RUNS = {"evs": evs}
