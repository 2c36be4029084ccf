"""Which placeholder columns belong to which image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from vlmprune.errors import LayoutError


@dataclass(frozen=True, eq=False)
class ImageSpans:
    """The images of a call in prompt order.

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


def find_image_spans(visual_mask: Tensor, features: Sequence[Tensor]) -> ImageSpans:
    """Match placeholders with image features.

    Args:
        visual_mask: bool `[batch, columns]` on the CPU, true at placeholders.
        features: projected features `[tokens, dim]` per image, in prompt order.

    Raises:
        LayoutError: if the numbers differ, or an image would run over the end of a row.
    """
    flat = visual_mask.flatten().nonzero().flatten()
    counts = tuple(len(feature) for feature in features)
    if sum(counts) != flat.numel():
        raise LayoutError(
            f"The prompt has {flat.numel()} image placeholders, the {len(counts)} images have {sum(counts)} features {counts}."
        )
    if 0 in counts:
        raise LayoutError(f"Image {counts.index(0)} has no visual tokens; counts per image: {counts}.")
    starts = list(accumulate(counts, initial=0))
    row = (flat // visual_mask.shape[1]).tolist()
    rows = tuple(row[start] for start in starts[:-1])
    for image, (start, end) in enumerate(pairwise(starts)):
        if row[end - 1] != row[start]:
            raise LayoutError(
                f"The {counts[image]} features of image {image} do not fit the placeholders of row {row[start]}; "
                "a processor with another patch size or number of tiles made the prompt."
            )
    return ImageSpans(counts, rows, _repeated(features), flat)


def _repeated(features: Sequence[Tensor]) -> tuple[int, ...]:
    seen: dict[int, int] = {}
    return tuple(seen.setdefault(id(feature), len(seen)) for feature in features)


def columns_of(images: Sequence[int], spans: ImageSpans) -> Tensor:
    """Return the flat columns of the given images one after the other, int64 on the CPU."""
    starts = list(accumulate(spans.counts, initial=0))
    return torch.cat([spans.flat[starts[image] : starts[image + 1]] for image in images])
