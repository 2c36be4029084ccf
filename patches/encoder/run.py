"""One run of a vision tower whose tokens get fewer from block to block."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.encoder_method import BlockBatch, EncoderMethod, Reduction

from ..tower.tower_tokens import MergedPlaces, TowerTokens
from .reduced_tokens import ReducedTokens


class TowerReduction:
    """What the hooks on the blocks know of one run.

    Attributes:
        method: what reduces.
        plan: patches that leave each block.
        patches: patches that a tile has in the first block.
        tower: facts of the tower.
        leading: tokens in front of them.
        trailing: tokens that the method appended.
        tokens: what became of them.
        goes_on: the reduced hidden states that the next block gets, where the host has seen the restored ones.
        shorter: the residual stream behind the reduction between a block's attention and its MLP.
        mlp: what that block's MLP made of it.
        attention: softmaxed attention that the running block uses in place of its own.
        captured: projections of the running block, "keys", "queries" and "values", `[tiles, tokens, heads * head_dim]`.
        read: reduced outputs of the blocks that make the features, by block.
        counts: patches that are left of each tile, where tiles differ; else None.
    """

    def __init__(
        self,
        method: EncoderMethod,
        plan: tuple[int, ...],
        patches: int,
        tower: TowerFacts,
        hidden: Tensor,
        trailing: int,
    ) -> None:
        self.method = method
        self.plan = plan
        self.patches = patches
        self.tower = tower
        self.leading = int(tower.has_cls)
        self.trailing = trailing
        self.tokens = ReducedTokens(hidden, trailing)
        self.grid = _square(patches)
        self.goes_on: Tensor | None = None
        self.shorter: Tensor | None = None
        self.mlp: Tensor | None = None
        self.attention: Tensor | None = None
        self.captured: dict[str, Tensor] = {}
        self.read: dict[int, Tensor] = {}
        self.counts: tuple[int, ...] | None = None

    def removes(self, block: int) -> bool:
        """Whether a block removes something."""
        return self.removed(block) > 0

    def removed(self, block: int) -> int:
        """Return how many patches a block removes."""
        if block >= len(self.plan):
            return 0
        return (self.plan[block - 1] if block else self.patches) - self.plan[block]

    @property
    def bias(self) -> Tensor | None:
        """What attention adds to its logits, fp32 `[tiles, tokens]`: logarithms of the sizes, or what hides padding; or None."""
        sizes, valid = self.tokens.sizes, self.valid
        if sizes is not None and self.method.proportional:
            return sizes.log()
        return None if valid is None else torch.zeros(valid.shape, device=valid.device).masked_fill(~valid, -torch.inf)

    @property
    def valid(self) -> Tensor | None:
        """Which tokens there are, bool `[tiles, tokens]`; None while all tiles have equally many."""
        if self.counts is None:
            return None
        places = torch.arange(self.tokens.positions.shape[1], device=self.tokens.positions.device)
        ends = torch.tensor(self.counts, device=places.device) + self.leading
        return places < ends[:, None]

    def reduce(self, block: int, hidden: Tensor, attention: Any) -> Tensor:
        """Return `hidden [tiles, tokens, dim]` as the method reduces it at a block whose attention module is given."""
        projected = {name: values.unflatten(-1, (attention.num_heads, -1)) for name, values in self.captured.items()}
        batch = BlockBatch(
            block=block,
            hidden=hidden,
            remove=self.removed(block),
            tower=self.tower,
            sizes=self.tokens.sizes,
            leading=self.leading,
            trailing=self.trailing,
            grid=self.grid,
            positions=self.tokens.positions,
            key=projected.get("keys"),
            query=projected.get("queries"),
            scale=attention.head_dim**-0.5,
            biased=self.method.proportional,
        )
        decided = self.method.removed(batch)
        if decided is not None:
            fewest = min(decided)
            self.plan = (*self.plan[:block], *(batch.patches - fewest for _ in self.plan[block:]))
            if not any(decided):
                return hidden
            uneven = tuple(decided) if max(decided) > fewest else None
            batch = replace(batch, remove=fewest, removes=uneven)
            if uneven is not None:
                self.counts = tuple(batch.patches - gone for gone in uneven)
        reduction = self.method.reduce(batch)
        check_reduction(self.method, batch, reduction)
        self.tokens.reduce(hidden, reduction, self.method.drops)
        self.grid = None
        self.attention = reduction.attention
        return reduction.values

    def tower_tokens(self) -> TowerTokens:
        """Return what the run hands on, after its last reducing block."""
        leading, outputs = self.leading, self.plan[-1]
        groups = self.tokens.groups[:, leading : leading + self.patches] - leading
        groups = torch.where((groups < 0) | (groups >= outputs), -1, groups)
        taken = self.tokens.positions[:, leading : leading + outputs] - leading
        if self.valid is not None:
            # Behind all others.
            taken = taken.masked_fill(~self.valid[:, leading:], self.patches)
        numbers = torch.arange(outputs, device=taken.device).expand_as(taken)
        places, order = taken.sort(1)
        if self.method.order == "official":
            order = numbers
        rank = torch.empty_like(order).scatter_(1, order, numbers)
        groups = torch.where(groups < 0, -1, rank.gather(1, groups.clamp(min=0)))
        return TowerTokens(groups, MergedPlaces(places, order, self.counts) if self.method.output == "merged" else None)

    def project(self, hidden: Tensor, block: nn.Module) -> None:
        """Project the keys and queries that the method reads of a block's input, ahead of the block."""
        layer: Any = block
        normed = layer.layer_norm1(hidden)
        for kind in self.method.reads:
            projection = layer.self_attn.k_proj if kind == "keys" else layer.self_attn.q_proj
            self.captured[kind] = projection(normed)


def _square(patches: int) -> tuple[int, int] | None:
    side = round(patches**0.5)
    return (side, side) if side * side == patches else None


def check_reduction(method: EncoderMethod, batch: BlockBatch, reduction: Reduction) -> None:
    """Raise RuntimeError where a method's answer does not fit what it was asked, as a method from outside may have it."""
    tiles, tokens, dim = batch.hidden.shape
    outputs = tokens - batch.remove
    wanted = {
        "values": (tiles, outputs, dim),
        "groups": (tiles, tokens),
        "targets": (tiles, outputs),
        "sizes": (tiles, outputs),
    }
    for name, shape in wanted.items():
        value = getattr(reduction, name)
        if isinstance(value, torch.Tensor) and tuple(value.shape) != shape:
            raise RuntimeError(
                f"{method.name!r} returned {name} {list(value.shape)} for block {batch.block}; needed: {list(shape)}."
            )
