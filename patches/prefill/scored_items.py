"""What of a prefill's visual tokens a method chooses among: images, videos without their newline, or frames one by one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from vlmprune.layout import VisualLayout, raster_layout
from vlmprune.methods.baselines.uniform import even_steps
from vlmprune.methods.batch import TILE_KINDS, Selection, VisualBatch
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import VIDEOS
from vlmprune.methods.shared.position_tokens import choose_input


@dataclass(frozen=True, eq=False)
class Item:
    """What a method sees as one image.

    Attributes:
        image: which of the shown images and videos it belongs to.
        frame: which frame of it, None for all of it.
        places: int64 on the CPU, its tokens among those of the image; None for all of them.
        layout: their geometry.
        budget: how many of them stay.
    """

    image: int
    frame: int | None
    places: Tensor | None
    layout: VisualLayout
    budget: int


def video_raster(layout: VisualLayout) -> VisualLayout:
    """Return the geometry of a video's frames without its newlines."""
    assert layout.tile_grid is not None
    return raster_layout(*layout.tile_grid, layout.frames)


def visual_budget(method: InputMethod, layout: VisualLayout, modality: str) -> int:
    """Return how many tokens of an image or video are kept, the newlines of a video, which always stay, among them."""
    if modality == "video":
        newlines = int(layout.newline.sum())
        frames = max(1, layout.frames)
        return min(layout.total, method.video_budget(frames, (layout.total - newlines) // frames) + newlines)
    return layout.total if VIDEOS in method.needs else method.budget(layout.total)


def scored_items(
    method: InputMethod, layouts: Sequence[VisualLayout], modalities: Sequence[str], budgets: Sequence[int]
) -> list[Item]:
    """Return what the method chooses among, image after image; tokens in none of them stay if their image is not cut in frames.

    Args:
        method: what chooses.
        layouts: geometry of each shown image or video.
        modalities: "image" or "video" of each.
        budgets: tokens of each that stay, newlines of videos included.

    Raises:
        LayoutError: a video that the method cannot choose among.
    """
    items = []
    for image, (layout, modality, budget) in enumerate(zip(layouts, modalities, budgets, strict=True)):
        if modality != "video":
            if VIDEOS not in method.needs:
                items.append(Item(image, None, None, layout, budget))
            continue
        raster, newlines = video_raster(layout), int(layout.newline.sum())
        method.check_video(layout.frames, *layout.tile_grid)  # type: ignore[misc]
        places, budget = (~layout.newline).nonzero().flatten() if newlines else None, budget - newlines
        if not method.frame_by_frame:
            items.append(Item(image, None, places, raster, budget))
            continue
        patches = torch.arange(raster.total) if places is None else places
        picture = raster_layout(*layout.tile_grid)  # type: ignore[misc]
        shares = frame_shares(layout.frames, budget)
        for frame, (share, mine) in enumerate(zip(shares, patches.split(picture.total), strict=True)):
            if share:
                items.append(Item(image, frame, mine, picture, share))
    return items


def frame_shares(frames: int, budget: int) -> list[int]:
    """Return an even share of a video's budget for each of its frames, the larger shares evenly spaced."""
    share, rest = divmod(budget, frames)
    larger = set(even_steps(frames, rest).tolist()) if rest else set()
    return [share + (frame in larger) for frame in range(frames)]


def choose_among(method: InputMethod, batch: VisualBatch, items: Sequence[Item]) -> Selection:
    """Return what a method keeps of all visual tokens of `batch`, if it chooses among `items` of them.

    Args:
        method: what chooses.
        batch: all images and videos, newlines included.
        items: from `scored_items`.
    """
    if len(items) == len(batch.counts) and all(item.places is None for item in items):
        return choose_input(method, batch)
    starts = batch.offsets
    inside = [
        starts[item.image] + (torch.arange(item.layout.total) if item.places is None else item.places) for item in items
    ]
    # Of a video that is cut in frames those without a share are dropped; newlines, and images beside videos, are in no item.
    untouched = torch.ones(starts[-1], dtype=torch.bool)
    for image in {item.image for item in items}:
        if batch.modalities[image] == "video":
            untouched[starts[image] : starts[image + 1]] = batch.layouts[image].newline
        else:
            untouched[starts[image] : starts[image + 1]] = False
    left = untouched.nonzero().flatten()
    device = batch.features.device
    places = torch.cat(inside)
    index = places.to(device, non_blocking=True)
    chosen = choose_input(method, _batch_of(batch, items, _view(places), index))
    return _joined(batch, items, index, left.to(device, non_blocking=True), chosen, _per_image(batch, untouched))


def _view(places: Tensor) -> slice | None:
    """Return ascending `places` as a slice, where there are no gaps between them, so that a video need not be copied."""
    first, count = int(places[0]), len(places)
    whole = int(places[-1]) - first == count - 1 and bool((places.diff() == 1).all())
    return slice(first, first + count) if whole else None


def _batch_of(batch: VisualBatch, items: Sequence[Item], view: slice | None, index: Tensor) -> VisualBatch:
    rows = index if view is None else view
    images = [item.image for item in items]
    tile_vision = {
        signal: tuple(
            # Towers over tiles of one size encode each frame as a tile.
            parts[item.image] if item.frame is None else parts[item.image][item.frame : item.frame + 1]
            for item in items
        )
        for signal, parts in batch.tile_vision.items()
        if signal.kind in TILE_KINDS
    }
    return replace(
        batch,
        features=batch.features[rows],
        counts=tuple(item.layout.total for item in items),
        budgets=tuple(item.budget for item in items),
        layouts=tuple(item.layout for item in items),
        vision={signal: values[rows] for signal, values in batch.vision.items()},
        tile_vision=tile_vision,
        instructions=tuple(batch.instructions[image] for image in images) if batch.instructions else (),
        questions=tuple(batch.questions[image] for image in images) if batch.questions else (),
        modalities=tuple(batch.modalities[image] for image in images),
        coordinates=None if batch.coordinates is None else batch.coordinates[rows],
    )


def _per_image(batch: VisualBatch, untouched: Tensor) -> list[int]:
    return [int(part.sum()) for part in untouched.split(list(batch.counts))]


def _joined(
    batch: VisualBatch,
    items: Sequence[Item],
    index: Tensor,
    left: Tensor,
    chosen: Selection,
    totals: list[int],
) -> Selection:
    """Return the selection of `items` as one of all images; `left` are the packed tokens beside them, which stay."""
    device = index.device
    item_starts = _starts([item.layout.total for item in items]).repeat_interleave(torch.tensor(chosen.counts))
    kept = index[chosen.kept.to(device) + item_starts.to(device, non_blocking=True)]
    kept, order = torch.cat([kept, left]).sort()
    totals = list(totals)
    for item, count in zip(items, chosen.counts, strict=True):
        totals[item.image] += count
    counts = tuple(totals)
    first = torch.tensor(batch.offsets[:-1]).repeat_interleave(torch.tensor(counts)).to(device, non_blocking=True)
    selection = Selection(kept - first, counts)
    if chosen.scores is not None:
        scores = torch.full((batch.offsets[-1],), torch.nan, device=device)
        scores[index] = chosen.scores.to(device, torch.float32)
        selection = replace(selection, scores=scores)
    if chosen.groups is not None:
        outputs = _starts(chosen.counts).repeat_interleave(torch.tensor([item.layout.total for item in items]))
        places = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device))
        image_of = torch.arange(len(counts)).repeat_interleave(torch.tensor(batch.counts)).to(device, non_blocking=True)
        outputs_before = _starts(counts).to(device, non_blocking=True)
        own = chosen.groups.to(device)
        into = places[own.clamp(min=0) + outputs.to(device, non_blocking=True)] - outputs_before[image_of[index]]
        groups = torch.full((batch.offsets[-1],), -1, device=device)
        groups[index] = torch.where(own < 0, own, into)
        groups[left] = places[len(order) - len(left) :] - outputs_before[image_of[left]]
        selection = replace(selection, groups=groups)
    if chosen.carried is not None and not len(left):
        selection = replace(selection, carried=chosen.carried[order])
    if chosen.features is not None:
        own_values = batch.features[left].to(chosen.features.dtype)
        selection = replace(selection, features=torch.cat([chosen.features, own_values])[order])
    if chosen.merge is not None:
        merge = chosen.merge

        def merge_all(values: Tensor) -> Tensor:
            rows, beside, places = (part.to(values.device) for part in (index, left, order))
            return torch.cat([merge(values[rows]), values[beside]])[places]

        selection = replace(selection, merge=merge_all)
    return selection


def _starts(counts: Sequence[int]) -> Tensor:
    sizes = torch.tensor(counts, dtype=torch.int64)
    return sizes.cumsum(0) - sizes
