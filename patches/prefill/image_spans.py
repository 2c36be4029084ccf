"""Which placeholder columns belong to which image or video."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vlmprune.errors import LayoutError


@dataclass(frozen=True, eq=False)
class ImageSpans:
    """The images and videos of a call in prompt order.

    Attributes:
        counts: visual tokens per image.
        rows: batch row per image.
        unique: for each image the index of the encoded image that it shows; beams and return sequences repeat images.
        flat: int64 `[sum(counts)]` on the CPU, `row * columns + column` of every visual token.
    """

    counts: tuple[int, ...]
    rows: tuple[int, ...]
    unique: tuple[int, ...]
    flat: Tensor

    @property
    def first_of(self) -> tuple[int, ...]:
        """For each encoded image the first place where it is shown."""
        return tuple(self.unique.index(image) for image in range(max(self.unique) + 1))


def find_image_spans(
    visual_mask: Tensor, counts: Sequence[int], unique: Sequence[int], modality: str = "image"
) -> ImageSpans:
    """Match placeholders with the features of one modality.

    Args:
        visual_mask: bool `[batch, columns]` on the CPU, true at placeholders.
        counts: visual tokens per image as the model gets them, in prompt order.
        unique: which encoded image each image shows, every one of them from 0 up at least once.
        modality: what messages call it.

    Raises:
        LayoutError: if the numbers differ, or an image would run over the end of a row.
    """
    flat = visual_mask.flatten().nonzero().flatten()
    counts = tuple(counts)
    if sum(counts) != flat.numel():
        raise LayoutError(
            f"The prompt has {flat.numel()} {modality} placeholders, the {len(counts)} {modality}s have {sum(counts)} "
            f"features {counts}."
        )
    if 0 in counts:
        raise LayoutError(
            f"{modality.capitalize()} {counts.index(0)} has no visual tokens; counts per {modality}: {counts}."
        )
    starts = list(accumulate(counts, initial=0))
    row = (flat // visual_mask.shape[1]).tolist()
    rows = tuple(row[start] for start in starts[:-1])
    for image, (start, end) in enumerate(pairwise(starts)):
        if row[end - 1] != row[start]:
            raise LayoutError(
                f"The {counts[image]} features of {modality} {image} do not fit the placeholders of row {row[start]}; "
                "a processor with another patch size or number of tiles made the prompt."
            )
    return ImageSpans(counts, rows, tuple(unique), flat)


def merge_spans(parts: Sequence[ImageSpans]) -> ImageSpans:
    """Return the images of several modalities as one sequence in prompt order; `unique` counts on from part to part."""
    if len(parts) == 1:
        return parts[0]
    entries: list[tuple[int, int, int, int, Tensor]] = []
    before = 0
    for part in parts:
        for count, row, image, flat in zip(
            part.counts, part.rows, part.unique, part.flat.split(list(part.counts)), strict=True
        ):
            entries.append((int(flat[0]), count, row, before + image, flat))
        before += max(part.unique) + 1
    entries.sort(key=lambda entry: entry[0])
    _, counts, rows, unique, flat = zip(*entries, strict=True)
    return ImageSpans(counts, rows, unique, torch.cat(flat))


def columns_of(images: Sequence[int], spans: ImageSpans) -> Tensor:
    """Return the flat columns of the given images one after the other, int64 on the CPU."""
    starts = list(accumulate(spans.counts, initial=0))
    return torch.cat([spans.flat[starts[image] : starts[image + 1]] for image in images])
