"""The base of the methods that reduce tokens inside the vision tower, between or in its blocks."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from ..budget import check_keep
from .base import Method, Site
from .batch import TowerFacts
from .checks import check_choice
from .needs import FREE_ORDER, TOWER_BLOCKS, Need

Output = Literal["full", "merged"]
Order = Literal["position", "official"]
Place = Literal["before attention", "after attention", "after block"]
Reading = Literal["keys", "queries"]


@dataclass(frozen=True, eq=False)
class BlockBatch:
    """The tokens of all tiles at one block of the vision tower, where a method may reduce them.

    A tile's tokens are the leading ones (CLS), the patches or what they were merged into, and the trailing ones that the
    method itself has appended. Leading tokens come first and trailing ones last in what a method returns too.

    Attributes:
        block: 0-based block.
        hidden: `[tiles, tokens, dim]` residual stream, in the tower's dtype: the block's input ("before attention"), behind its
            attention ("after attention"), or its output ("after block").
        remove: how many tokens are to go here, by the method's `plan`; of tiles that lose different numbers the lowest.
        removes: how many go of each tile, where they lose different numbers; else None.
        tower: the vision tower.
        sizes: fp32 `[tiles, tokens]`, how many tokens each stands for; None while every token stands for itself.
        leading: tokens of each tile that precede the patches: 1 where there is a CLS token, else 0.
        trailing: tokens that the method appended.
        grid: `(rows, columns)` of the patches, None once they were reduced.
        positions: int64 `[tiles, tokens]`, index of the token, CLS included, that each stood for in the tower's first block, or
            whose place it took; -1 for trailing tokens.
        key: keys of the block's attention, `[tiles, tokens, heads, head_dim]`, of a method that reads them. Before the attention
            these are those of `hidden`, after it and after the block those that it used.
        query: its queries, likewise.
        scale: factor of the logits.
        biased: whether the attention has the logarithm of the sizes added to its logits.
    """

    block: int
    hidden: Tensor
    remove: int
    tower: TowerFacts
    sizes: Tensor | None = None
    leading: int = 0
    trailing: int = 0
    grid: tuple[int, int] | None = None
    positions: Tensor | None = None
    key: Tensor | None = None
    query: Tensor | None = None
    scale: float = 1.0
    biased: bool = False
    removes: tuple[int, ...] | None = None

    @property
    def patches(self) -> int:
        """Tokens of a tile between the leading and the trailing ones."""
        return self.hidden.shape[1] - self.leading - self.trailing

    @cached_property
    def attention(self) -> Tensor:
        """The block's softmaxed attention, fp32 `[tiles, heads, queries, keys]`; needs queries and keys, and much memory."""
        assert self.query is not None
        assert self.key is not None
        logits = self.scale * self.query.float().transpose(1, 2) @ self.key.float().permute(0, 2, 3, 1)
        if self.biased and self.sizes is not None:
            logits = logits + self.sizes.log()[:, None, None]
        return torch.softmax(logits, -1)


@dataclass(frozen=True, eq=False)
class Reduction:
    """What a method makes of the tokens of every tile, `outputs` of `tokens`.

    Attributes:
        values: `[tiles, outputs, dim]`, dtype of the hidden states.
        groups: int64 `[tiles, tokens]`, the output that each token went into, -1 where it is dropped.
        targets: int64 `[tiles, outputs]`, the token whose place each output takes.
            Where tiles lose different numbers, `BlockBatch.removes`, those with fewer outputs have rows behind them that
            nothing looks at, and no group leads to.
        sizes: fp32 `[tiles, outputs]`, how many tokens each output stands for; None where the method keeps no sizes.
        restore: turns later values of the outputs, `[tiles, outputs, dim]`, into values of the tokens, `[tiles, tokens, dim]`. By
            default every token gets a copy of its output's, and a dropped token the hidden state that it was dropped with.
        attention: `[tiles, heads, outputs, outputs]`, softmaxed, that the block uses in place of its own; only from a method that
            reduces before the attention.
    """

    values: Tensor
    groups: Tensor
    targets: Tensor
    sizes: Tensor | None = None
    restore: Callable[[Tensor], Tensor] | None = None
    attention: Tensor | None = None


@dataclass(frozen=True)
class BlockShape:
    """Sizes of one reduction of one tile, for its cost.

    Attributes:
        tokens: tokens before it, CLS token included.
        outputs: tokens after it.
        dim: width of the tower.
        heads: its attention heads.
        leading: tokens in front of the patches.
        block: 0-based block.
        layers: all blocks of the tower.
    """

    tokens: int
    outputs: int
    dim: int
    heads: int
    leading: int = 0
    block: int = 0
    layers: int = 1


@dataclass(frozen=True, kw_only=True)
class EncoderMethod(Method):
    """A method that reduces tokens in the blocks of the vision tower that precede its features.

    Attributes:
        keep: with `output="merged"` the visual tokens that leave the tower, with "full" those that leave each block, averaged
            over the blocks: a share of the tile's patches (a float in (0, 1]), or a number (an int) per tile, of which most
            families have one an image; None where other parameters fix it.
        output: "full" gives every patch a feature again, so that only the tower gets cheaper; "merged" hands the merged
            tokens on, so that the language model gets fewer.
        order: with `output="merged"`, whether merged tokens stand in the order of the tokens whose place they took, or in the
            official code's.
        drops: whether tokens can be dropped, -1 in `Reduction.groups`, and not only merged; a class attribute.
    """

    output: Output = "full"
    order: Order = "position"

    site: ClassVar[Site] = "encoder"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_BLOCKS})
    merges: ClassVar[bool] = True
    drops: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.keep is not None:
            object.__setattr__(self, "keep", check_keep(self.keep))
        check_choice("output", self.output, get_args(Output))
        check_choice("order", self.order, get_args(Order))
        if self.output == "merged":
            object.__setattr__(self, "needs", type(self).needs | {FREE_ORDER})

    @property
    def place(self) -> Place:
        """Where in a block tokens are reduced: before its attention, between attention and MLP, or behind it."""
        return "after attention"

    @property
    def reads(self) -> frozenset[Reading]:
        """What `reduce` reads of a block's attention."""
        return frozenset()

    @property
    def proportional(self) -> bool:
        """Whether attention counts a token as often as its size says: the logarithm of the size is added to the logits."""
        return False

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return how many patches of a tile, or what they were merged into, leave each block before the features.

        Args:
            patches: patches of a tile.
            tower: the vision tower; `tower.feature_layer + 1` blocks precede its features.

        Raises:
            BudgetError: the budget cannot be reached; names the nearest.
            ParameterError: the parameters do not fit this tower.
        """
        raise NotImplementedError

    def plan_of_grid(self, grid: tuple[int, int], tower: TowerFacts) -> tuple[int, ...]:
        """Return the plan of a picture of `(rows, columns)` visual tokens, of a tower that takes pictures of any size."""
        return self.plan(grid[0] * grid[1], tower)

    def trailing(self, tower: TowerFacts) -> int:
        """Return how many tokens `append` gives."""
        return 0

    def append(self, hidden: Tensor, tower: TowerFacts) -> Tensor | None:
        """Return tokens `[tiles, trailing, dim]` to put behind those of the first block's input `[tiles, tokens, dim]`, or None.

        They do not leave the tower.
        """
        return None

    def removed(self, batch: BlockBatch) -> Sequence[int] | None:
        """Return how many patches of each tile go at a block where the tokens decide and not `plan`; None where `plan` does."""
        return None

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Reduce the tokens of every tile by `batch.remove`; called where fewer tokens leave a block than enter it by `plan`."""
        raise NotImplementedError

    def reduction_macs(self, shape: BlockShape) -> int | None:
        """Return the multiply-accumulates of `reduce` for one tile, queries and keys of the block apart; None if not declared."""
        return None

    def restoring_macs(self, shape: BlockShape) -> int:
        """Return those of one call of `Reduction.restore` for one tile; 0 where values are copied."""
        return 0


def block_tokens(
    method: EncoderMethod, patches: int, tower: TowerFacts, grid: tuple[int, int] | None = None
) -> tuple[tuple[int, int], ...]:
    """Return how many tokens of a tile go through attention and through the MLP of each block, leading ones left out.

    Args:
        method: what reduces them.
        patches: patches of a tile.
        tower: the vision tower.
        grid: rows and columns of the patches, where towers take pictures of any size.
    """
    plan = method.plan(patches, tower) if grid is None else method.plan_of_grid(grid, tower)
    trailing = method.trailing(tower)
    if plan[-1] == patches:
        return ((patches, patches),) * tower.layers
    counts = []
    before = patches
    for block in range(tower.layers):
        after = plan[block] if block < len(plan) else before
        attended = after if method.place == "before attention" else before
        counts.append((attended + trailing, (before if method.place == "after block" else after) + trailing))
        before = after
    return tuple(counts)
