"""Visual batches built by hand from the tensors of a case."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlmprune.layout import VisualLayout, raster_layout, unknown_layout
from vlmprune.methods.base import Method
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch

# CLIP-ViT-L/14-336 in LLaVA: the output of layer 22 of 24 becomes the visual tokens.
CLIP = TowerFacts(layers=24, feature_layer=22, has_cls=True)


def square_layout(count: int) -> VisualLayout:
    """Return the plain raster of an uncut image, of unknown geometry where `count` is no square."""
    side = round(count**0.5)
    return raster_layout(side, side) if side * side == count else unknown_layout(count)


def make_batch(
    method: Method,
    layouts: Sequence[VisualLayout],
    features: Tensor | None = None,
    vision: Mapping[VisionSignal, Tensor] | None = None,
    tower: TowerFacts = CLIP,
    video: bool = False,
    **more: object,
) -> VisualBatch:
    """Return the batch that the engine would hand to `method`; of several frames, or if `video` says so, an image is a video."""
    counts = tuple(layout.total for layout in layouts)
    modalities = tuple("video" if video or layout.frames > 1 else "image" for layout in layouts)
    return VisualBatch(
        features=torch.zeros(sum(counts), 1) if features is None else features,
        counts=counts,
        budgets=tuple(
            method.budget(layout.total)
            if modality == "image"
            else method.video_budget(layout.frames, layout.total // layout.frames)
            for layout, modality in zip(layouts, modalities, strict=True)
        ),
        layouts=tuple(layouts),
        tower=tower,
        vision=vision or {},
        modalities=modalities,
        **more,  # type: ignore[arg-type]
    )


def stacked(values: Sequence[Tensor], batched: bool) -> Tensor:
    """Return results of equally large images under one more axis in front, or that of the one image of an unbatched case."""
    if not batched:
        (only,) = values
        return only
    return torch.stack(list(values))


def kept_per_image(selection: Selection) -> list[Tensor]:
    """Return the kept indices of every image."""
    return list(selection.kept.split(list(selection.counts)))
