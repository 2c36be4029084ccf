"""Weighted averages of the tokens of every tile, by a map of groups."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.merge_scatter import merge_scatter


def merge_tokens(hidden: Tensor, groups: Tensor, weights: Tensor | None, outputs: int) -> tuple[Tensor, Tensor]:
    """Return the weighted average of each group, summed up in fp32, and the sum of its weights.

    Args:
        hidden: `[tiles, tokens, dim]`.
        groups: int64 `[tiles, tokens]`, the output of each token, -1 for none.
        weights: `[tiles, tokens]`; None for 1 each.
        outputs: outputs of a tile.

    Returns:
        `[tiles, outputs, dim]` in the dtype of `hidden`, and fp32 `[tiles, outputs]`.
    """
    tiles, _, dim = hidden.shape
    if tiles > 1:
        groups = torch.where(groups < 0, groups, groups + outputs * torch.arange(tiles, device=groups.device)[:, None])
    # The kernel has no backward; the reference has.
    implementation = "torch" if hidden.requires_grad and torch.is_grad_enabled() else None
    values, sizes = merge_scatter(
        hidden.reshape(-1, dim),
        groups.reshape(-1),
        None if weights is None else weights.reshape(-1),
        tiles * outputs,
        implementation=implementation,
    )
    return values.view(tiles, outputs, dim), sizes.view(tiles, outputs)
