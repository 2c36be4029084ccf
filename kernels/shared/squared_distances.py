"""Squared Euclidean distances inside ragged segments, the same in both directions to the bit."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise

import torch
from torch import Tensor

# Elements of padded features or distances that the reference holds at a time.
BLOCK_ELEMENTS = 2**22

# Squared distances below this share of the squared norms are roundings of equal vectors.
_ROUNDING = 1e-12


def squared_distances(rows: Tensor, columns: Tensor) -> Tensor:
    """Return the squared distances of `rows [..., r, dim]` to `columns [..., c, dim]`, fp32 `[..., r, c]`.

    Products are summed in fp64, so that little is lost where vectors lie close together; equal vectors are 0 apart.
    """
    left, right = rows.double(), columns.double()
    norms = torch.linalg.vecdot(left, left)[..., :, None] + torch.linalg.vecdot(right, right)[..., None, :]
    squares = torch.baddbmm(norms, left, right.transpose(-1, -2), alpha=-2.0)
    return squares.masked_fill_(squares < norms * _ROUNDING, 0.0).to(torch.float32)


def symmetric_squared_distances(values: Tensor) -> Tensor:
    """Return the squared distances among `values [segments, tokens, dim]`, fp32, exactly symmetric, 0 on the diagonal."""
    wide = values.double()
    products = torch.bmm(wide, wide.transpose(-1, -2))
    lengths = products.diagonal(dim1=-2, dim2=-1)
    norms = lengths[..., :, None] + lengths[..., None, :]
    squares = torch.sub(norms, products, alpha=2.0)
    upper = squares.masked_fill_(squares < norms * _ROUNDING, 0.0).to(torch.float32).triu_(1)
    return upper + upper.transpose(-1, -2)


def segment_blocks(bounds: Sequence[int], dim: int, limit: int = BLOCK_ELEMENTS) -> Iterator[range]:
    """Yield runs of segments whose padded features and distances stay within `limit` elements; one segment at least."""
    first, longest = 0, 0
    sizes = [end - begin for begin, end in pairwise(bounds)]
    for segment, size in enumerate(sizes):
        widest = max(longest, size)
        if segment > first and (segment + 1 - first) * widest * max(widest, dim) > limit:
            yield range(first, segment)
            first, widest = segment, size
        longest = widest
    if first < len(sizes):
        yield range(first, len(sizes))


def padded_segments(values: Tensor, bounds: Sequence[int], block: range) -> tuple[Tensor, Tensor]:
    """Return the segments of a block side by side, `[segments, longest, dim]`, and bool `[segments, longest]`: no padding."""
    lengths = [bounds[segment + 1] - bounds[segment] for segment in block]
    longest = max(lengths)
    part = values[bounds[block.start] : bounds[block.stop]]
    if min(lengths) == longest:
        return part.reshape(len(lengths), longest, part.shape[1]), torch.ones(
            len(lengths), longest, dtype=torch.bool, device=values.device
        )
    inside = torch.arange(longest)[None] < torch.tensor(lengths)[:, None]
    inside = inside.to(values.device)
    padded = part.new_zeros(len(lengths), longest, part.shape[1])
    padded[inside] = part
    return padded, inside
