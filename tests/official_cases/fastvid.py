"""Cases of FastVID: one video in a sequence of text, by each of the three official codes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.shared.frame_segments import neighbour_cosines
from vlmprune.methods.video.fastvid import FastVID
from vlmprune.methods.video.fastvid_plan import Form


def fastvid(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One video of a case."""
    variant = params["variant"]
    form: Form = "qwen" if variant.startswith("qwen") else "video" if variant.startswith("llava_video") else "onevision"
    frames, height, width = params["frames"], params["h"], params["w"]
    first, after, hidden = params["n_pre"], params["n_post"], inputs["hidden"].float()
    video = hidden[first : len(hidden) - after]
    # LLaVA-Video has a newline behind every row of the grid.
    newlines = form == "video"
    places = torch.arange(len(video)).view(frames, height, width + newlines)
    patches = places[..., :width].flatten()
    features = video[patches].view(frames, height * width, -1)
    method = FastVID(
        keep=float(params["retention_ratio"]),
        scenes=params["c"],
        tau=params["tau"],
        ignore=params.get("ignore"),
        context=params["d"],
        step=params["p"],
        beta=params["beta"],
        form=form,
        faithful=True,
    )
    alike = neighbour_cosines(inputs["glob"]).tolist()
    lengths = method.lengths(alike)
    shares = method.shares(alike, lengths, height * width, 0)
    rows = method.merge(features, inputs["attn"].float(), lengths, shares)
    output = video.clone()
    output[patches[rows.kept]] = rows.values
    kept = torch.zeros(len(video), dtype=torch.bool)
    kept[patches[rows.kept]] = True
    if newlines:
        # A newline stays with any token of its row.
        kept[places[..., -1]] = kept[places[..., :-1]].any(-1)
    keep = torch.cat(
        [torch.arange(first), first + kept.nonzero().flatten(), torch.arange(len(hidden) - after, len(hidden))]
    )
    text = hidden.clone()
    text[first : len(hidden) - after] = output
    results = {"segment_sizes": torch.tensor(lengths), "keep": keep, "output": text[keep]}
    if form == "onevision":
        results["salient"] = method.salient(inputs["attn"].float(), shares).view(frames, -1) % (height * width)
    if form == "qwen":
        results["per_frame"] = torch.bincount(rows.kept // (height * width), minlength=frames)
        results["kept_position_ids"] = inputs["position_ids"][..., keep]
    return results


RUNS = {"fastvid": fastvid}
