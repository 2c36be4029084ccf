"""One run of a tower over packed pictures whose visual tokens get fewer from block to block."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.encoder_method import BlockBatch, EncoderMethod

from ..tower.tower_tokens import TowerTokens
from .reduced_tokens import ReducedTokens, spread
from .run import check_reduction

# Channels added to a head on either side of its rotary halves: flash attention takes multiples of 8.
EXTRA = 4


@dataclass(eq=False)
class _Frames:
    """The pictures, or frames of videos, of one shape.

    Attributes:
        numbers: which of all frames they are.
        grid: rows and columns of their visual tokens.
        plan: visual tokens that leave each block.
        first: int64 `[frames, tokens]`, the row of each visual token in the tower's first block, raster order.
        rows: int64 `[frames, tokens now]`, the row of each token in the running block.
        slots: int64 `[frames, tokens now]`, the row in the first block whose place each has.
        tokens: what became of them.
    """

    numbers: list[int]
    grid: tuple[int, int]
    plan: tuple[int, ...]
    first: Tensor
    rows: Tensor
    slots: Tensor
    tokens: ReducedTokens

    def removed(self, block: int) -> int:
        """Return how many visual tokens of a frame a block removes."""
        if block >= len(self.plan):
            return 0
        return (self.plan[block - 1] if block else self.first.shape[1]) - self.plan[block]


@dataclass(eq=False)
class PackedReduction:
    """What the hooks on the blocks know of one run.

    A row is one visual token: its patches side by side, as the merger behind the tower takes them. Rows stay in the order of the
    places that they have, so that the frames, and the windows inside them, stay runs of rows.

    Attributes:
        method: what reduces.
        tower: the vision tower.
        frames: the frames, by their shape.
        slots: int64 `[rows]`, ascending, the row in the first block whose place each has.
        goes_on: the reduced hidden states that the next block gets, where the host has seen the restored ones.
        shorter: the residual stream behind the reduction between a block's attention and its MLP.
        mlp: what that block's MLP made of it.
        projected: what the running block projected, `[patches, 3 * dim]`.
        bias: logarithms of the sizes, fp32 `[patches now]`, that attention adds to its logits; None while there are none.
        given: arguments of the running block as the host passed them.
    """

    method: EncoderMethod
    tower: TowerFacts
    frames: list[_Frames]
    slots: Tensor
    goes_on: Tensor | None = None
    shorter: Tensor | None = None
    mlp: Tensor | None = None
    projected: Tensor | None = None
    bias: Tensor | None = None
    given: dict[str, Any] = field(default_factory=dict)
    _total: int = 0

    @classmethod
    def begin(
        cls,
        method: EncoderMethod,
        tower: TowerFacts,
        grids: Sequence[tuple[int, int]],
        order: Tensor | None,
        hidden: Tensor,
    ) -> PackedReduction | None:
        """Return the state in front of the first block; None where nothing is to be reduced.

        Args:
            method: what reduces.
            tower: the vision tower.
            grids: rows and columns of visual tokens of each frame.
            order: int64 `[rows]`, the visual token, in raster order, of each row; None where that is the order of the rows.
            hidden: `[patches, dim]`, the first block's input.
        """
        rows = torch.arange(len(hidden) // tower.patches_per_token, device=hidden.device)
        places = rows if order is None else torch.empty_like(rows).scatter_(0, order.to(hidden.device), rows)
        parts = places.split([height * width for height, width in grids])
        by_shape: dict[tuple[int, int], list[int]] = {}
        for number, grid in enumerate(grids):
            by_shape.setdefault(grid, []).append(number)
        found = []
        for grid, numbers in by_shape.items():
            first = torch.stack([parts[number] for number in numbers])
            plan = method.plan_of_grid(grid, tower)
            found.append(_Frames(numbers, grid, plan, first, first, first, ReducedTokens(first[..., None], 0)))
        if all(frames.plan[-1] == frames.first.shape[1] for frames in found):
            return None
        return cls(method, tower, found, rows, _total=len(rows))

    @property
    def changed(self) -> bool:
        """Whether anything was reduced."""
        return any(frames.tokens.changed for frames in self.frames)

    @property
    def patches(self) -> int:
        """Patches of a row."""
        return self.tower.patches_per_token

    def removes(self, block: int) -> bool:
        """Whether a block removes something."""
        return any(frames.removed(block) for frames in self.frames)

    def reduce(self, block: int, hidden: Tensor, attention: Any) -> Tensor:
        """Return `hidden [patches, dim]` as the method reduces it at a block whose attention module is given."""
        units = hidden.reshape(len(self.slots), -1)
        keys = self._keys(attention) if "keys" in self.method.reads else None
        values = []
        for frames in self.frames:
            own = units[frames.rows]
            if frames.removed(block):
                batch = BlockBatch(
                    block=block,
                    hidden=own,
                    remove=frames.removed(block),
                    tower=self.tower,
                    sizes=frames.tokens.sizes,
                    grid=None if frames.tokens.changed else frames.grid,
                    positions=frames.tokens.positions,
                    key=None if keys is None else keys[frames.rows],
                    scale=attention.scaling,
                    biased=self.method.proportional,
                )
                reduction = self.method.reduce(batch)
                check_reduction(self.method, batch, reduction)
                frames.tokens.reduce(own, reduction, self.method.drops)
                frames.slots = frames.slots.gather(1, reduction.targets)
                own = reduction.values
            values.append(own.flatten(0, 1))
        taken = torch.cat([frames.slots.flatten() for frames in self.frames])
        self.slots, order = taken.sort()
        ranks = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
        for frames, part in zip(self.frames, ranks.split([each.slots.numel() for each in self.frames]), strict=True):
            frames.rows = part.view_as(frames.slots)
        self.bias = self._log_sizes()
        return torch.cat(values)[order].view(-1, hidden.shape[-1])

    def restored(self, hidden: Tensor) -> Tensor:
        """Give every patch of the first block a value again: `[patches now, dim]` to `[patches, dim]`."""
        units = hidden.reshape(len(self.slots), -1)
        parts = [frames.tokens.restored(units[frames.rows]).flatten(0, 1) for frames in self.frames]
        return self._in_place(parts).view(-1, hidden.shape[-1])

    def read_projection(self) -> Tensor:
        """Return what the running block projected with a row for every patch, that of what it was merged into."""
        assert self.projected is not None
        return self._whole(self.projected)

    def read_arguments(self) -> dict[str, Any]:
        """Return the arguments that go with it: each patch has the rotary positions of what it was merged into."""
        tables = self.given["position_embeddings"]
        return {**self.given, "position_embeddings": tuple(self._whole(self._left(table)) for table in tables)}

    def _whole(self, values: Tensor) -> Tensor:
        if not self.changed:
            return values
        units = values.reshape(len(self.slots), -1)
        parts = [spread(units[frames.rows], frames.tokens.groups).flatten(0, 1) for frames in self.frames]
        return self._in_place(parts).view(-1, values.shape[-1])

    def bounds(self, given: Tensor) -> Tensor:
        """Return the bounds of runs of patches, `given` for the first block's, among the patches that are left."""
        starts = torch.searchsorted(self.slots, given.to(torch.int64) // self.patches) * self.patches
        # A window may have lost all its rows.
        return starts.unique_consecutive().to(given.dtype)

    def rotary(self, table: Tensor, fill: float) -> Tensor:
        """Return the rows of a rotary table `[patches, head_dim]` that are left, widened where attention has a bias."""
        left = self._left(table)
        return left if self.bias is None else widened(left, fill)

    def _left(self, table: Tensor) -> Tensor:
        return table.reshape(self._total, -1)[self.slots].view(-1, table.shape[-1])

    def _log_sizes(self) -> Tensor | None:
        if not self.method.proportional:
            return None
        sizes = self.slots.new_ones(len(self.slots), dtype=torch.float32)
        for frames in self.frames:
            if frames.tokens.sizes is not None:
                sizes[frames.rows.flatten()] = frames.tokens.sizes.flatten()
        return sizes.log().repeat_interleave(self.patches)

    def with_bias(self, projected: Tensor, attention: Any) -> Tensor:
        """Put the bias into channels that the rotary positions leave alone: 1 in the query, `bias / scale` in the key.

        The host gives this attention no place for a mask. Wider heads give wider outputs; `attended` cuts them.
        """
        bias = self.bias
        if bias is None:
            return projected
        heads = attention.num_heads
        wide = widened(projected.view(len(projected), 3, heads, -1), 0.0)
        place = wide.shape[-1] // 2 - 1
        wide[:, 0, :, place] = 1.0
        wide[:, 1, :, place] = (bias / attention.scaling)[:, None].to(wide.dtype)
        return wide.flatten(1)

    def attended(self, output: Tensor, attention: Any) -> Tensor:
        """Cut the attention's output `[patches now, heads * wide]` to the channels of its values."""
        if self.bias is None:
            return output
        halves = output.view(len(output), attention.num_heads, 2, -1)
        return halves[..., : halves.shape[-1] - EXTRA].flatten(1)

    def tower_tokens(self) -> TowerTokens:
        """Return what the run hands on, frame by frame in the order of the pictures."""
        by_number: dict[int, Tensor] = {
            number: groups
            for frames in self.frames
            for number, groups in zip(frames.numbers, frames.tokens.groups, strict=True)
        }
        return TowerTokens(tuple(by_number[number] for number in sorted(by_number)))

    def _keys(self, attention: Any) -> Tensor:
        assert self.projected is not None
        key = self.projected.view(len(self.slots), self.patches, 3, attention.num_heads, -1)[:, :, 1]
        return key.float().mean(1)

    def _in_place(self, parts: Sequence[Tensor]) -> Tensor:
        values = torch.cat(list(parts))
        places = torch.cat([frames.first.flatten() for frames in self.frames])
        return values[places.argsort()]


def widened(values: Tensor, fill: float) -> Tensor:
    """Add channels behind both halves of the last dimension."""
    halves = values.unflatten(-1, (2, -1))
    return torch.nn.functional.pad(halves, (0, EXTRA), value=fill).flatten(-2)
