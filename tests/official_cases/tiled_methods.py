"""Cases of HiRED and GlobalCom2, which divide a budget over the tiles of an image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.anyres import anyres_layout, best_crops
from official_cases.batches import CLIP, kept_per_image, make_batch, square_layout, stacked
from official_cases.input_site import CLS_ATTENTION, Run, Tensors, pair, per_token, tile_and_token
from vlmprune.kernels.row_attention import row_attention
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import VisionSignal
from vlmprune.methods.input.globalcom2 import GlobalCom2, crop_shares
from vlmprune.methods.input.globalcom2_order import official_sequence
from vlmprune.methods.input.globalcom2_scores import guide, holistic_scores
from vlmprune.methods.input.hired import HiRED
from vlmprune.methods.shared.tile_segments import tile_segments

FIRST_LAYER = VisionSignal("cls_attention", 0)
LAST_LOGITS = VisionSignal("cls_logits", CLIP.layers - 1)


def cls_rows(inputs: Tensors, heads: int, logits: bool) -> Tensor:
    """Return the CLS row over the patches, `[tiles, heads, N]`, from projected queries and keys."""
    query, key = (inputs[name].unflatten(-1, (heads, -1)) for name in "qk")
    return row_attention(query[:, :1], key, logits=logits)[:, 0, :, 1:]


def hired(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Counts, masks over whole tiles, and the sequence that goes to the language model."""
    if "q" in inputs:
        return {"cls_attn": cls_rows(inputs, params["heads"], logits=False)}
    final = inputs["cls_attn_final"].transpose(1, 2)
    rate = float(params["token_budget_rate"])
    if "cls_attn_init" not in inputs:
        return _hired_untiled(rate, final)
    initial = inputs["cls_attn_init"].transpose(1, 2)
    is_paper = params["variant"] == "paper"
    topk = params.get("content_topk")
    method = HiRED(
        keep=rate,
        alpha=params.get("alpha", 0.5),
        content="mass" if is_paper else "count",
        content_topk=topk if isinstance(topk, int) else None,
        cells="grid" if is_paper else "bands",
        faithful=True,
    )
    if "num_tiles" in inputs:
        sizes, tiles = inputs["image_sizes"].tolist(), inputs["num_tiles"].tolist()
        grids = [best_crops(*size, params["tile"]) for size in sizes]
    else:
        sizes, tiles, grids = [pair(inputs["image_size"])], [len(final)], [pair(inputs["grid"])]
    side = params["tile"] // params["patch"]
    layouts = [anyres_layout(grid, side, *size) for grid, size in zip(grids, sizes, strict=True)]
    maps = list(zip(initial.split(tiles), final.split(tiles), strict=True))
    content = method.content_scores(
        torch.cat([per_token(first, layout).sum(-1) for (first, _), layout in zip(maps, layouts, strict=True)]),
        tuple(layouts),
        tile_segments(tuple(layouts)),
    )
    masks = [
        method.tile_masks(last.sum(-1), weights[: len(last) - 1], layout.total)
        for (_, last), weights, layout in zip(maps, content, layouts, strict=True)
    ]
    results = {
        "budgets": torch.cat([counts for counts, _ in masks]),
        "mask": torch.cat([mask for _, mask in masks]),
        "content": torch.cat([weights[: count - 1] for weights, count in zip(content, tiles, strict=True)]),
    }
    if len(layouts) == 1:
        results["packed"] = _hired_packed(method, layouts[0], *maps[0])
        transposed = anyres_layout((grids[0][1], grids[0][0]), side, *sizes[0])
        results["packed_official"] = _hired_packed(method, transposed, *maps[0])
    return results


def _hired_packed(method: HiRED, layout: VisualLayout, initial: Tensor, final: Tensor) -> Tensor:
    vision = {FIRST_LAYER: per_token(initial, layout), CLS_ATTENTION: per_token(final, layout)}
    batch = make_batch(method, [layout], vision=vision, tile_vision={CLS_ATTENTION: (final,)})
    content = method.content_scores(vision[FIRST_LAYER].sum(-1), batch.layouts, tile_segments(batch.layouts))
    (official,) = method.official_tokens(batch, CLS_ATTENTION, content)
    (kept,) = kept_per_image(method.select(batch))
    # The official count may exceed `keep`, which counts no padding; then the method gives a part of it.
    if len(kept) != min(len(official), batch.budgets[0]) or not torch.isin(kept, official).all():
        raise AssertionError(f"{kept.tolist()} are not {batch.budgets[0]} of the official tokens {official.tolist()}")
    return tile_and_token(layout)[official]


def _hired_untiled(rate: float, final: Tensor) -> dict[str, Tensor]:
    """Images of one tile each, `[images, N, heads]`; results of several images lie under one more axis in front."""
    images, tokens = final.shape[:2]
    method = HiRED(keep=rate, faithful=True)
    scores = final.flatten(0, 1)
    vision = {FIRST_LAYER: torch.zeros_like(scores), CLS_ATTENTION: scores}
    tile_vision = {CLS_ATTENTION: tuple(final.split(1))}
    batch = make_batch(method, [square_layout(tokens)] * images, vision=vision, tile_vision=tile_vision)
    kept = kept_per_image(method.select(batch))
    masks = [torch.zeros(tokens, dtype=torch.bool).index_fill_(0, chosen, True) for chosen in kept]
    return {"keep_idx": stacked(kept, images > 1), "mask": stacked(masks, images > 1)}


def globalcom2(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Crop ratios and scores, and the sequence that goes to the language model in both orders.

    With `num_tiles [images]`, `grid` and `image_size` are `[images, 2]`, and the results of the images follow each other.
    """
    if "q" in inputs:
        return {"cls_scores": cls_rows(inputs, params["heads"], logits=True).mean(1)}
    tiles = inputs["num_tiles"].tolist() if "num_tiles" in inputs else [len(inputs["cls_scores"])]
    maps = inputs["cls_scores"].split(tiles)
    side = params["tile"] // params["patch"]
    layouts = []
    for grid, size in zip(inputs["grid"].view(-1, 2), inputs["image_size"].view(-1, 2), strict=True):
        (columns, rows), (width, height) = pair(grid), pair(size)
        layouts.append(anyres_layout((rows, columns), side, height, width))
    rate, temperature = float(params["retention_ratio"]), params["temperature"]
    token_scores = [per_token(scores, layout) for scores, layout in zip(maps, layouts, strict=True)]
    method = GlobalCom2(keep=rate, temperature=temperature, faithful=True)
    batch = make_batch(method, layouts, vision={LAST_LOGITS: torch.cat(token_scores)[:, None]})
    images = [
        _globalcom2_image(layout, scores, kept, rate, temperature)
        for layout, scores, kept in zip(layouts, token_scores, kept_per_image(method.select(batch)), strict=True)
    ]
    return {name: torch.cat([image[name] for image in images]) for name in images[0]}


def _globalcom2_image(
    layout: VisualLayout, scores: Tensor, chosen: Tensor, rate: float, temperature: float
) -> dict[str, Tensor]:
    assert layout.crops is not None
    crops, ids, segments = layout.crops[0] * layout.crops[1], tile_and_token(layout), tile_segments((layout,))
    crop_tokens = segments.order[segments.offsets[1] : segments.offsets[crops + 1]]
    boost, view = guide(scores, layout, temperature)
    kept, official = ids[chosen], ids[official_sequence(layout, chosen, scores)]
    by_crop = [kept[kept[:, 0] == crop, 1] for crop in range(1, crops + 1)]
    return {
        "scales": crop_shares(boost, rate),
        "n_valid": segments.sizes[0, 1:-1],
        "valid_idx": ids[crop_tokens, 1],
        "global_scores": view[crop_tokens],
        "combined": holistic_scores(scores, view, segments)[crop_tokens],
        "packed_fixed": kept,
        "packed_official": official,
        "counts": torch.tensor([len(tokens) for tokens in by_crop]),
        "crop_keep": torch.cat(by_crop),
        "thumb_idx": official[official[:, 0] == 0, 1],
    }


RUNS: dict[str, Run] = {"hired": hired, "globalcom2": globalcom2}
