"""Where kept tokens stand in an image, carried beside their embeddings: exact in every dtype."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHANNELS = 4
"""High and low byte of row and column: bf16 holds whole numbers up to 256 exactly."""
_BYTE = 256


def append_places(features: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Return `features [tokens, dim]` with the channels of their places appended, `[tokens, dim + CHANNELS]`."""
    both = torch.stack([rows, columns], dim=-1)
    channels = torch.stack([both // _BYTE, both % _BYTE], dim=-1).flatten(1)
    return torch.cat([features, channels.to(features.device, features.dtype)], dim=1)


def split_places(embeddings: Sequence[Tensor]) -> tuple[list[Tensor], Tensor]:
    """Return embeddings without the channels of their places, and the places: int64 `[3, tokens]`, of time 0, row and column."""
    features = [item[:, :-CHANNELS] for item in embeddings]
    high_and_low = torch.cat([item[:, -CHANNELS:] for item in embeddings]).long().unflatten(1, (2, 2))
    rows_and_columns = high_and_low[..., 0] * _BYTE + high_and_low[..., 1]
    return features, torch.nn.functional.pad(rows_and_columns, (1, 0)).T


def base_positions(length: int, images: Sequence[tuple[int, int, int]]) -> tuple[Tensor, int]:
    """Return the M-RoPE ids of a prompt of text and images, at all tokens of an image those of its first place.

    A token in row r and column c of its image is at `(0, r, c)` behind that. Text goes on behind the image's longer side, as in
    the full prompt.

    Args:
        length: tokens of the prompt, kept tokens of images included.
        images: for each image, in their order, the column of its first token, how many are kept, and the rows or columns of
            its grid, whichever are more.

    Returns:
        int64 `[3, length]`, and what is added to the index of a generated token for its position.
    """
    steps = torch.ones(length, dtype=torch.int64)
    for first, kept, side in images:
        steps[first : first + kept] = 0
        steps[first + kept - 1] = side
    behind = steps.cumsum(0)
    positions = behind - steps
    for first, kept, side in images:
        positions[first : first + kept] = behind[first + kept - 1] - side
    end = int(behind[-1]) if length else 0
    return positions.expand(3, -1).clone(), end - length
