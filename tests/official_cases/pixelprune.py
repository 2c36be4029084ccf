"""Cases of PixelPrune: which tokens stay, their pixels, and the prompt without the others."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.kernels.unpredicted_tokens import unpredicted_tokens
from vlmprune.methods.input.pixelprune_pixels import first_frame, token_pixels


def pixelprune_selection(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Kept tokens and their patches, of every image."""
    merge = params["spatial_merge_size"]
    grids = [(height // merge, width // merge) for _, height, width in inputs["image_grid_thw"].tolist()]
    exact = params["metric"] == "exact"
    kept = unpredicted_tokens(
        token_pixels(inputs["pixel_values"], merge**2),
        grids,
        tau=0.0 if exact else params["threshold"],
        metric="max" if exact else params["metric"],
        scan=params["method"],
        anchored=params["anchored"],
    )
    results = {}
    for image, mask in enumerate(kept.split([rows * columns for rows, columns in grids])):
        tokens = mask.nonzero().flatten()
        results[f"merged_keep_{image}"] = tokens
        results[f"patch_keep_{image}"] = (tokens[:, None] * merge**2 + torch.arange(merge**2)).flatten()
    return results


def pixelprune_prompt(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """What stays of one prompt: everything but the placeholders of dropped tokens, positions as they were."""
    ids, merge = inputs["input_ids"], params["spatial_merge_size"]
    placeholders = (ids[0] == params["image_token_id"]).nonzero().flatten()
    counts = (inputs["image_grid_thw"].prod(-1) // merge**2).tolist()
    bounds = torch.tensor([0, *counts]).cumsum(0).tolist()
    keep_mask = (ids != params["image_token_id"]).clone()
    for image, (begin, end) in enumerate(pairwise(bounds)):
        name = f"merged_keep_{image}"
        kept = inputs[name] if name in inputs else torch.arange(end - begin)
        keep_mask[0, placeholders[begin:end][kept]] = True
    return {
        "keep_mask": keep_mask,
        "new_input_ids": ids[keep_mask][None],
        "new_position_ids": inputs["position_ids"][:, 0, keep_mask[0]],
    }


def pixelprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of any kind."""
    if "input_ids" in inputs:
        return pixelprune_prompt(params, inputs)
    if "method" in params:
        return pixelprune_selection(params, inputs)
    return {"normalized": first_frame(inputs["pixel_values"])}


RUNS = {"pixelprune": pixelprune}
