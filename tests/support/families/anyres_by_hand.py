"""What a method must see of images cut in tiles, made with the unpatched model: its eager tower and its own packing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape

from vlmprune.layout import VisualLayout
from vlmprune.methods.base import Method
from vlmprune.methods.batch import TowerFacts, VisionSignal, VisualBatch


def host_packed(model: Any, maps: Tensor, size: Tensor, newline: float = 0.0) -> Tensor:
    """Return `maps [tiles, side * side, channels]` in the order of the visual tokens, `newline` at newlines."""
    line = torch.full((maps.shape[-1],), newline)
    if model.config.model_type == "llava_next":
        return model.model.pack_image_features([maps], size[None], "default", line)[0][0]
    return model.model.pack_image_features([maps], size[None], line, model.config.vision_aspect_ratio)[0][0]


def layout_by_hand(model: Any, tiles: int, size: Tensor) -> VisualLayout:
    """Return the layout that the host's packing of coordinates shows."""
    vision = model.config.vision_config
    side = vision.image_size // vision.patch_size
    crops = (
        get_anyres_image_grid_shape(size, model.config.image_grid_pinpoints, vision.image_size) if tiles > 1 else None
    )
    tile, row, column = torch.meshgrid(torch.arange(tiles), torch.arange(side), torch.arange(side), indexing="ij")
    across = crops[1] if crops else 1
    crop = (tile - 1).clamp(min=0)
    places = [tile > 0, crop // across * side + row, crop % across * side + column]
    packed = host_packed(model, torch.stack(places, -1).flatten(1, 2).float(), size, -1.0)
    newline, is_crop = packed[:, 0] < 0, packed[:, 0] > 0
    place_row, place_column = (packed[:, 1:] + 0.5001).floor().long().T
    on_thumbnail = ~is_crop & ~newline
    stitched = torch.stack([place_row, place_column])
    if tiles > 1:
        columns = int((newline[side * side :]).nonzero()[0]) if bool(newline.any()) else 0
        rows = (len(newline) - side * side) // (columns + 1)
        raster = torch.stack(
            [(torch.arange(rows * (columns + 1))) // (columns + 1), torch.arange(rows * (columns + 1)) % (columns + 1)]
        )
        interpolated = not torch.equal(packed[is_crop, 1:], packed[is_crop, 1:].round())
        if interpolated:
            stitched[:, side * side :] = raster
        stitched = stitched.masked_fill(~is_crop, -1)
        last = torch.where(newline, torch.arange(len(newline)) - 1, torch.arange(len(newline)))
        tiles_of = torch.where(on_thumbnail, 0, 1 + place_row[last] // side * across + place_column[last] // side)
    else:
        stitched, tiles_of = stitched.masked_fill(newline, -1), torch.zeros(len(newline), dtype=torch.int64)
    return VisualLayout(
        tile=tiles_of,
        row=(place_row % side).masked_fill(newline, -1),
        column=(place_column % side).masked_fill(newline, -1),
        stitched_row=stitched[0],
        stitched_column=stitched[1],
        newline=newline,
        frame=torch.zeros_like(tiles_of),
        tile_grid=(side, side),
        crops=crops,
    )


@torch.no_grad()
def signal_by_hand(model: Any, signal: VisionSignal, pixels: Tensor) -> Tensor:
    """Return a signal at the patches of every tile, `[tiles, side * side, heads]`, from the tower's eager attention."""
    tower = model.model.vision_tower
    previous = tower.config._attn_implementation
    tower.set_attn_implementation("eager")
    try:
        output = tower(pixels, output_attentions=True, output_hidden_states=True)
    finally:
        tower.set_attn_implementation(previous)
    weights = output.attentions[signal.layer]
    if signal.kind == "cls_logits":
        layer = getattr(tower, "vision_model", tower).encoder.layers[signal.layer]
        attention, hidden = layer.self_attn, layer.layer_norm1(output.hidden_states[signal.layer])
        query, key = (
            projection(hidden).unflatten(-1, (attention.num_heads, -1))
            for projection in (attention.q_proj, attention.k_proj)
        )
        rows = torch.einsum("thd,tkhd->tkh", query[:, 0], key) * attention.scale
    elif signal.kind == "cls_attention":
        rows = weights[:, :, 0].transpose(1, 2)
    else:
        rows = weights.mean(2).transpose(1, 2)
    side = model.config.vision_config.image_size // model.config.vision_config.patch_size
    return rows[:, rows.shape[1] - side * side :]


@torch.no_grad()
def batch_by_hand(
    model: Any, inputs: dict[str, Tensor], tiles: list[int], method: Method, tower: TowerFacts, **given: Any
) -> VisualBatch:
    """Return what `method` must see of images with these numbers of tiles."""
    sizes = inputs["image_sizes"]
    pixels = torch.cat([image[:count] for image, count in zip(inputs["pixel_values"], tiles, strict=True)])
    features = model.get_image_features(inputs["pixel_values"], sizes, **given).pooler_output
    counts = tuple(len(tokens) for tokens in features)
    maps = {signal: signal_by_hand(model, signal, pixels).split(tiles) for signal in method.vision_signals(tower)}
    return VisualBatch(
        features=torch.cat(list(features)),
        counts=counts,
        budgets=tuple(method.budget(count) for count in counts),
        layouts=tuple(layout_by_hand(model, count, size) for count, size in zip(tiles, sizes, strict=True)),
        tower=tower,
        vision={
            signal: torch.cat([host_packed(model, image, size) for image, size in zip(images, sizes, strict=True)])
            for signal, images in maps.items()
        },
        tile_vision={signal: tuple(images) for signal, images in maps.items()},
    )


def check_seen(seen: VisualBatch, expected: VisualBatch, whole_tiles: bool) -> None:
    """Assert that a method saw what was made by hand."""
    assert (seen.counts, seen.budgets, seen.tower) == (expected.counts, expected.budgets, expected.tower)
    torch.testing.assert_close(seen.features, expected.features)
    for layout, by_hand in zip(seen.layouts, expected.layouts, strict=True):
        assert (layout.crops, layout.tile_grid, layout.grid) == (by_hand.crops, by_hand.tile_grid, None)
        for name in ("tile", "row", "column", "stitched_row", "stitched_column", "newline", "frame"):
            assert torch.equal(getattr(layout, name), getattr(by_hand, name)), name
    assert set(seen.vision) == set(expected.vision)
    for signal, values in expected.vision.items():
        assert seen.vision[signal].dtype == torch.float32
        torch.testing.assert_close(seen.vision[signal], values, atol=1e-5, rtol=1e-4)
    assert set(seen.tile_vision) == (set(expected.tile_vision) if whole_tiles else set())
    for signal, images in seen.tile_vision.items():
        for maps, by_hand_maps in zip(images, expected.tile_vision[signal], strict=True):
            torch.testing.assert_close(maps, by_hand_maps, atol=1e-5, rtol=1e-4)
