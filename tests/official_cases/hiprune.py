"""Cases of HiPrune: scores of given tiles, or the reduction of whole attention maps to scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import CLIP, kept_per_image, make_batch, square_layout
from official_cases.input_site import Tensors
from vlmprune.kernels.received_attention import received_attention
from vlmprune.layout import raster_layout
from vlmprune.methods.batch import TowerFacts, VisualBatch
from vlmprune.methods.input.hiprune import HiPrune
from vlmprune.patches.calls import TowerCall
from vlmprune.patches.tower.packed import WindowedTowerReader

QWEN = TowerFacts(layers=32, feature_layer=31, has_cls=False, patches_per_token=4)


def hiprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """LLaVA's tiles, each an image of the batch; Qwen's image; or attention maps."""
    if "attn" in inputs:
        return {"score": _qwen_scores(inputs["attn"], inputs["window_index"])}
    if "grid_h" in params:
        return _qwen(params, inputs)
    if "attn_deep" in inputs:
        scores = {
            name: received(inputs[source]) for name, source in (("shallow", "attn_object"), ("deep", "attn_deep"))
        }
        return {**scores, "mask": _llava({**params, "tokens_per_tile": params["budget"]}, scores)["mask"]}
    return _llava(params, inputs)


def received(attention: Tensor) -> Tensor:
    """Return the attention that each patch receives, `[tiles, N]`, from maps `[tiles, heads, 1 + N, 1 + N]`, CLS token first."""
    return received_by_all(attention)[:, 1:]


def received_by_all(attention: Tensor) -> Tensor:
    """Return the attention that each token receives, `[tiles, tokens]`, from maps `[tiles, heads, tokens, tokens]`.

    Queries and keys are made that give just this attention.
    """
    tiles, heads, tokens, _ = attention.shape
    query = attention.clamp(min=torch.finfo(torch.float32).tiny).log().transpose(1, 2).flatten(0, 1)
    key = torch.eye(tokens)[:, None].expand(tokens, heads, tokens).repeat(tiles, 1, 1)
    bounds = torch.arange(tiles + 1) * tokens
    return received_attention(query, key, bounds, scale=1.0).view(tiles, tokens)


def _llava(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    tiles, tokens = inputs["deep"].shape
    method = HiPrune(keep=params["tokens_per_tile"], alpha=params["alpha"])
    shallow, deep = method.vision_signals(CLIP)
    vision = {shallow: inputs["shallow"].reshape(-1, 1), deep: inputs["deep"].reshape(-1, 1)}
    batch = make_batch(method, [square_layout(tokens)] * tiles, vision=vision)
    anchors = method.anchors(batch)
    kept = torch.stack(kept_per_image(method.select(batch)))
    return {
        "anchors": anchors.indices.view(tiles, -1),
        "group": anchors.group[:tokens].nonzero().flatten(),
        "keep_idx": kept,
        "mask": torch.zeros(tiles, tokens, dtype=torch.bool).scatter_(1, kept, True),
    }


def _qwen(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    layout = raster_layout(params["grid_h"], params["grid_w"])

    def mask(method: HiPrune) -> Tensor:
        shallow, deep = method.vision_signals(QWEN)
        # The case sums over queries, the tower readers take the mean.
        queries = layout.total * QWEN.patches_per_token
        vision = {shallow: inputs["shallow"][:, None] / queries, deep: inputs["deep"][:, None] / queries}
        batch: VisualBatch = make_batch(method, [layout], vision=vision, tower=QWEN)
        return torch.zeros(layout.total, dtype=torch.bool).index_fill_(0, method.select(batch).kept, True)

    fixed = HiPrune(keep=float(params["retain"]), alpha=params["alpha"])
    return {"mask_fixed": mask(fixed), "mask_official": mask(replace(fixed, faithful=True))}


def _qwen_scores(attention: Tensor, window_index: Tensor) -> Tensor:
    heads, patches, _ = attention.shape
    query = attention.clamp(min=torch.finfo(torch.float32).tiny).log().transpose(0, 1)
    key = torch.eye(patches)[:, None].expand(patches, heads, patches)
    scores = received_attention(query, key, [0, patches], scale=1.0, reduce_queries="sum")
    frame = TowerCall(captured={("window_index", 0): window_index})
    return WindowedTowerReader().raster_order(scores.view(-1, QWEN.patches_per_token).mean(1), frame)


RUNS = {"hiprune": hiprune}
