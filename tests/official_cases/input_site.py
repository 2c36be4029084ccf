"""Cases of the methods that select before the language model, fed to the project's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.anyres import anyres_layout
from official_cases.batches import CLIP, kept_per_image, make_batch, square_layout, stacked
from vlmprune.kernels.max_min_from_distances import max_min_from_distances
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import TowerFacts, VisionSignal
from vlmprune.methods.input.divprune import DivPrune, divprune_order
from vlmprune.methods.input.fastervlm import FasterVLM, fastervlm_score
from vlmprune.methods.input.vtc_cls import VTCCLS, vtc_cls_score

Tensors = Mapping[str, Tensor]
Run = Callable[[Mapping[str, Any], Tensors], dict[str, Tensor]]

CLS_ATTENTION = VisionSignal("cls_attention", CLIP.feature_layer)


def fastervlm(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Each tile is one image of the batch; with a grid, also all of them as the tiles of one image."""
    attention = inputs["cls_attn"].transpose(1, 2)
    tiles, tokens = attention.shape[:2]
    method = FasterVLM(keep=params["visual_token_num"])
    batch = make_batch(method, [square_layout(tokens)] * tiles, vision={CLS_ATTENTION: attention.flatten(0, 1)})
    kept = torch.stack(kept_per_image(method.select(batch)))
    mask = torch.zeros(tiles, tokens, dtype=torch.bool).scatter_(1, kept, True)
    results = {"keep_idx": kept, "mask": mask, "score": fastervlm_score(attention)}
    if "grid" in inputs:
        layout = anyres_layout(pair(inputs["grid"]), round(tokens**0.5), 1, 1, unpad=False, newlines=False)
        whole = FasterVLM(keep=params["visual_token_num"] * tiles)
        batch = make_batch(whole, [layout], vision={CLS_ATTENTION: per_token(attention, layout)})
        results["packed"] = tile_and_token(layout)[whole.select(batch).kept]
    return results


def vtc_cls(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Rows `[layers, heads, 1 + N]` of one image, or `[layers, images, heads, 1 + N]`.

    The official code sums up to the last layer but one, which is the feature layer.
    """
    rows = inputs["cls_attn_rows"]
    batched = rows.ndim == 4
    layers = (rows if batched else rows[:, None])[..., 1:].transpose(2, 3)
    _, images, tokens = layers.shape[:3]
    tower = TowerFacts(layers=len(layers), feature_layer=len(layers) - 2, has_cls=True)
    method = VTCCLS(keep=params["token_num"], start_layer=params["start_layer"])
    vision = {VisionSignal("cls_attention", index): layer.flatten(0, 1) for index, layer in enumerate(layers)}
    batch = make_batch(method, [square_layout(tokens)] * images, vision=vision, tower=tower)
    score = vtc_cls_score([vision[signal] for signal in method.vision_signals(tower)])
    return {
        "keep_idx": stacked(kept_per_image(method.select(batch)), batched),
        "score": stacked(score.split(tokens), batched),
    }


def divprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Images given by their features `[N, dim]` or `[images, N, dim]`, or by the distances `[..., N, N]` among them."""
    if "distance" in inputs:
        distance = inputs["distance"]
        batched = distance.ndim == 3
        orders = [max_min_from_distances(each, params["K"]) for each in (distance if batched else distance[None])]
        return {
            "order": stacked(orders, batched),
            "indices_sorted": stacked([order.sort().values for order in orders], batched),
        }
    features = inputs["features"]
    batched, ratio = features.ndim == 3, params.get("ratio")
    images, tokens = (len(features) if batched else 1), features.shape[-2]
    method = DivPrune(keep=params["K"] if ratio is None else float(ratio))
    batch = make_batch(method, [square_layout(tokens)] * images, features=features.view(images * tokens, -1))
    return {
        "order": stacked(divprune_order(batch).split(list(batch.budgets)), batched),
        "indices_sorted": stacked(kept_per_image(method.select(batch)), batched),
    }


def pair(values: Tensor) -> tuple[int, int]:
    """Return a tensor of two numbers as a tuple."""
    first, second = values.tolist()
    return first, second


def tile_and_token(layout: VisualLayout) -> Tensor:
    """Return tile and index inside the tile of every visual token `[tokens, 2]`; (-1, -1) for newlines."""
    assert layout.tile_grid is not None
    both = torch.stack([layout.tile, layout.row * layout.tile_grid[1] + layout.column], dim=1)
    return both.masked_fill(layout.newline[:, None], -1)


def per_token(tiles: Tensor, layout: VisualLayout) -> Tensor:
    """Turn maps `[tiles, N, ...]` into values per visual token of an image; 0 for newlines."""
    tile, token = tile_and_token(layout).clamp(min=0).T
    values = tiles[tile, token]
    return values.masked_fill(layout.newline.view(-1, *[1] * (values.ndim - 1)), 0)


RUNS: dict[str, Run] = {"fastervlm": fastervlm, "vtc_cls": vtc_cls, "divprune": divprune}
