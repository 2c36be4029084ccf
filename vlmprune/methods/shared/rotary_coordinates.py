"""Which tokens stand where rotary positions are nearly the identity or a quarter turn: large mean cosine, large mean sine."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_tables(positions: Tensor, inverse_frequencies: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rotary cosines and sines of every axis by itself, fp32 `[axes, tokens, head_dim]` each.

    Args:
        positions: position ids `[axes, tokens]`: one axis of 1-D positions, time, height and width of M-RoPE.
        inverse_frequencies: `[head_dim / 2]`.
    """
    angles = positions[..., None].float() * inverse_frequencies.float()
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def table_means(tables: Tensor) -> Tensor:
    """Return the mean over axes and channels of a table `[axes, tokens, head_dim]`, fp32 `[tokens]`.

    Tokens whose height and width are exchanged get equal values to the last bit, so that ties between them are ties.
    """
    axes = tables.float().mean(-1)
    if len(axes) == 1:
        return axes[0]
    time, height, width = axes[-3:]
    return (time + (height + width)) / 3


def coordinate_ranks(cosines: Tensor, sines: Tensor) -> Tensor:
    """Return a score by which tokens are taken in turns from the largest mean cosines and the largest mean sines.

    Args:
        cosines: fp32 `[tokens]` of one image.
        sines: the same.

    Returns:
        fp32 `[tokens]`, highest first: minus the better of a token's two ranks, ties to the lowest index.
    """
    return -torch.minimum(_rank(cosines), _rank(sines)).float()


def _rank(values: Tensor) -> Tensor:
    order = values.argsort(descending=True, stable=True)
    return torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
