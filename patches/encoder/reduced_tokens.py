"""The tokens of one running vision tower as they get fewer, and how every patch gets a value again."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.kernels.unmerge import unmerge
from vlmprune.methods.encoder_method import Reduction


@dataclass(eq=False)
class _Level:
    """Reductions that are undone together.

    Attributes:
        reduction: of a level with a `restore` of its own, the one reduction.
        groups: of all others int64 `[tiles, tokens]`, the output of each token, -1 where it was dropped.
        left: the hidden states that dropped tokens were dropped with, `[tiles, tokens, dim]`; None while none was.
    """

    reduction: Reduction | None
    groups: Tensor
    left: Tensor | None = None


class ReducedTokens:
    """What became of the tokens of all tiles since the tower's first block.

    Attributes:
        groups: int64 `[tiles, tokens]`, for each token of the first block, trailing ones too, where it is now; -1 if dropped.
        positions: int64 `[tiles, tokens now]`, the token of the first block whose place each has.
        sizes: fp32 `[tiles, tokens now]`, or None.
        drops: whether tokens were dropped and not merged.
        changed: whether anything was reduced.
    """

    def __init__(self, hidden: Tensor, trailing: int) -> None:
        tiles, tokens = hidden.shape[:2]
        whole = torch.arange(tokens, device=hidden.device).expand(tiles, -1)
        self.tokens = tokens - trailing
        self.groups = whole
        self.positions = torch.where(whole < self.tokens, whole, -1)
        self.sizes: Tensor | None = None
        self.drops = False
        self.soft = False
        self.changed = False
        self._levels: list[_Level] = []

    def reduce(self, hidden: Tensor, reduction: Reduction, drops: bool) -> None:
        """Take in what a method made of `hidden`.

        Args:
            hidden: `[tiles, tokens, dim]`, the tokens before.
            reduction: what was made of them.
            drops: whether some went into no output.
        """
        level = self._levels[-1] if self._levels else None
        if reduction.restore is not None:
            self._levels.append(_Level(reduction, reduction.groups))
            self.soft = True
        elif level is None or level.reduction is not None:
            self._levels.append(_Level(None, reduction.groups, hidden if drops else None))
        else:
            before = level.groups
            level.groups = _composed(before, reduction.groups)
            if drops:
                dropped = (level.groups < 0) & (before >= 0)
                now = unmerge(hidden, before)
                level.left = now if level.left is None else torch.where(dropped[..., None], now, level.left)
        self.groups = _composed(self.groups, reduction.groups)
        self.positions = self.positions.gather(1, reduction.targets)
        self.sizes = reduction.sizes
        self.drops |= drops
        self.changed = True

    def restored(self, hidden: Tensor) -> Tensor:
        """Give every token of the first block a value again: `[tiles, tokens now, dim]` to `[tiles, tokens, dim]`."""
        for level in reversed(self._levels):
            if level.reduction is not None:
                assert level.reduction.restore is not None
                hidden = level.reduction.restore(hidden)
            else:
                hidden = spread(hidden, level.groups)
                if level.left is not None:
                    hidden = torch.where(level.groups[..., None] < 0, level.left, hidden)
        return hidden[:, : self.tokens]


def spread(merged: Tensor, groups: Tensor) -> Tensor:
    """Return `merged[tile, groups[tile, token]]`, 0 where it is -1; with a gradient where one is asked for."""
    needs_backward = merged.requires_grad and torch.is_grad_enabled()
    return unmerge(merged, groups, implementation="torch" if needs_backward else None)


def _composed(before: Tensor, then: Tensor) -> Tensor:
    return torch.where(before < 0, before, then.gather(1, before.clamp(min=0)))
