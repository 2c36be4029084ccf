"""The positions by which a pruned language model rotates, and the columns that they belong to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from support.families.qwen_case import VIDEO_TOKEN
from support.tiny_models import IMAGE_TOKEN


@contextmanager
def rotary_positions(model: Any) -> Iterator[list[Tensor]]:
    """Collect the positions `[3, batch, columns]` that the language model rotates by, one entry a call."""
    seen: list[Tensor] = []

    def keep(module: Any, args: Any, kwargs: Any) -> None:
        seen.append((args[1] if len(args) > 1 else kwargs["position_ids"]).expand(3, -1, -1).clone())

    handle = model.model.language_model.rotary_emb.register_forward_pre_hook(keep, with_kwargs=True)
    try:
        yield seen
    finally:
        handle.remove()


def alive_columns(ids: Tensor, mask: Tensor, record: Any, row: int) -> Tensor:
    """Return the columns of a row that stay: valid text and kept tokens of images and videos, ascending."""
    visual = (ids[row] == IMAGE_TOKEN) | (ids[row] == VIDEO_TOKEN)
    alive, start = mask[row].bool() & ~visual, 0
    places = visual.nonzero().flatten()
    for image in (image for image in record.images if image.batch_index == row):
        alive[places[start : start + image.total][image.kept]] = True
        start += image.total
    return alive.nonzero().flatten()


def new_tokens(count: int) -> Tensor:
    """Return ids `[count, 1]` of a token for every row."""
    return torch.arange(21, 21 + count)[:, None]
