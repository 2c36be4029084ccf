"""The matrix of a soft merge: every token feeds several outputs, every output is made of several tokens."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize


def top_targets(score: Tensor, count: int, class_token: bool) -> Tensor:
    """Return the positions of the highest scores in ascending order, int64 `[batch, count]`; the class token is no target.

    Args:
        score: `[batch, tokens]`.
        count: number of targets.
        class_token: whether token 0 is one, which stands beside the matrix.
    """
    shift = int(class_token)
    order = score[:, shift:].sort(dim=-1, descending=True, stable=True).indices
    return order[:, :count].sort(-1).values + shift


def transformation(
    tokens: Tensor,
    sizes: Tensor | None,
    targets: Tensor,
    tau: float,
    mode: Literal["mass", "row"] = "mass",
    sources: int | None = None,
    class_token: bool = True,
) -> Tensor:
    """Return the matrix W, fp32 `[batch, targets, tokens]`, without the class token's row and column.

    Args:
        tokens: `[batch, tokens, dim]`.
        sizes: fp32 `[batch, tokens]`; None for 1 each.
        targets: int64 `[batch, targets]` positions.
        tau: temperature of the cosines.
        mode: "mass": every token shares its size out over the targets by softmax; "row": every target mixes all tokens by
            softmax, log size added.
        sources: how many targets a token feeds, the nearest ones; None for all.
        class_token: whether token 0 is one.
    """
    shift = int(class_token)
    rows = normalize(tokens.float(), dim=-1)
    at_targets = rows.gather(1, targets[..., None].expand(-1, -1, rows.shape[2]))
    logits = at_targets @ rows[:, shift:].transpose(1, 2) / tau
    if sources is not None and sources < targets.shape[1]:
        least = logits.topk(sources, dim=1).values[:, -1:]
        logits = logits.masked_fill(logits < least, -torch.inf)
    size = None if sizes is None else sizes.float()[:, None, shift:]
    if mode == "mass":
        shares = logits.softmax(1)
        return shares if size is None else shares * size
    return (logits if size is None else logits + size.log()).softmax(-1)


def soft_merge(
    tokens: Tensor,
    sizes: Tensor | None,
    matrix: Tensor,
    mode: Literal["mass", "row"] = "mass",
    class_token: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return `W X` with rows that sum to one, `[batch, (1 +) targets, dim]`, and the sizes, fp32, that sum to those before.

    The class token passes through. In mode "mass" sizes are the sums of the rows of W, in mode "row" all are the same.
    """
    shift = int(class_token)
    size = tokens.new_ones(tokens.shape[:2], dtype=torch.float32) if sizes is None else sizes.float()
    rows = matrix.sum(-1)
    mixed = (matrix @ tokens.float()[:, shift:] / rows[..., None]).to(tokens.dtype)
    mass = rows if mode == "mass" else (size[:, shift:].sum(-1, keepdim=True) / rows.shape[1]).expand_as(rows)
    return torch.cat([tokens[:, :shift], mixed], 1), torch.cat([size[:, :shift], mass], 1)
