"""MustDrop: windows of like patches merged in the vision tower, two thresholds on the text's attention in the language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isqrt
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.methods.base import Method
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_number
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Output, Place, Reduction
from vlmprune.methods.layer.mustdrop_filter import MustDropFilter
from vlmprune.methods.needs import CLS_TOKEN, FREE_ORDER, TOWER_BLOCKS, Need


@dataclass(frozen=True, kw_only=True)
class MustDrop(EncoderMethod):
    """Merge windows of like patches behind the first block of the vision tower, and filter by the text's attention later on.

    Patches are split in windows. A window whose mean cosine between its patches is at least `merge_threshold` becomes one
    token, their plain mean. In the language model `MustDropFilter` protects the tokens that the CLS token attends to most,
    filters the others after a few layers, and leaves only the last set in the KV cache.

    `keep=None` (the default) runs with the thresholds, so the images decide. A given `keep`, the average over layers, is met:
    the tower merges the `(N - K) // 8` likest windows (of 3 x 3), K the square root of the share, and the filter keeps the
    best by its own two tests. The paper's setting for 192 of 576 tokens is the default; `global_threshold=0.0012` is that
    for 128, `global_threshold=0.011, individual_threshold=0.01` that for 64, all on TextVQA with 32 layers.

    A merged token takes the place of its window's centre, and tokens stand in position order; officially merged windows come
    first, by falling likeness (`order="official"`).

    Attributes:
        window: rows and columns of a window, which divide the grid.
        merge_threshold: of a window's mean cosine.
        key_rate: share of the tokens that are protected.
        layers: 0-based layers after which tokens are filtered; (2, 6, 10, 14) of 32, scaled with the depth, if not given.
        global_threshold: of a token's share of the attention that all text pays to visual tokens.
        individual_threshold: of the highest attention that a single word pays.
        faithful: as in the official code, tiles of a call merge as many windows as the one that has the fewest, and tokens of
            later calls count their positions from what each layer's cache holds, though its keys were rotated otherwise; with
            `positions="compact"` this is the official decoding.
        keep_positions: whether two fifths of what each filter keeps are the tokens that carry position, by the rule of
            `IVCPrune`. Positions are then "original" unless `apply(..., positions=)` says otherwise.

    Source: "Multi-Stage Vision Token Dropping: Towards Efficient Multimodal Large Language Model", arXiv 2411.10803. The
    thresholds are published per benchmark, without a rule. The official code serves one row; here every row has its own.
    """

    output: Output = "merged"
    window: tuple[int, int] = (3, 3)
    merge_threshold: float = 0.8
    key_rate: float = 0.08
    layers: tuple[int, ...] | None = None
    global_threshold: float = 0.001
    individual_threshold: float = 0.001
    faithful: bool = False
    keep_positions: bool = False

    name: ClassVar[str] = "mustdrop"
    # So that the CLS token's attention is that of the merged tokens, and not of all patches.
    drops: ClassVar[bool] = True
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_BLOCKS, CLS_TOKEN, FREE_ORDER})
    symbols: ClassVar[Mapping[str, str]] = {
        "global_thr": "global_threshold=",
        "individual_thr": "individual_threshold=",
        "pruning_layers": "layers=",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.output != "merged":
            raise ParameterError(f"output={self.output!r}; allowed: 'merged', the filter acts on the merged tokens.")
        for size in self.window if isinstance(self.window, (tuple, list)) and len(self.window) == 2 else (None,):
            if isinstance(size, bool) or not isinstance(size, int) or size < 1:
                raise ParameterError(f"window={self.window!r}; allowed: two ints >= 1, rows and columns.")
        check_number("merge_threshold", self.merge_threshold, "[-1, 1]", "a cosine")
        check_number("key_rate", self.key_rate, "[0, 1]", "the share of the tokens that are protected")
        self.parts()

    @property
    def place(self) -> Place:
        """Behind the block."""
        return "after block"

    def parts(self) -> tuple[Method, ...]:
        """Return this first stage, and the filter unless nothing is to be dropped."""
        if self.keep == 1.0:
            return (self,)
        second = MustDropFilter(
            keep=self.keep,
            layers=self.layers,
            key_rate=self.key_rate,
            global_threshold=self.global_threshold,
            individual_threshold=self.individual_threshold,
            faithful=self.faithful,
            keep_positions=self.keep_positions,
        )
        return (self, second)

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return what the windows that `keep` asks for leave; with thresholds, what one merged window leaves."""
        side, (rows, columns) = isqrt(patches), self.window
        if side * side != patches or side % rows or side % columns:
            raise ParameterError(
                f"window={self.window!r} does not divide the tower's {patches} patches ({side} x {side}); allowed: divisors of "
                "its rows and columns."
            )
        saved = rows * columns - 1
        windows = patches // (rows * columns)
        if self.keep is None:
            merged = min(1, saved)
        else:
            share = self.keep / patches if isinstance(self.keep, int) else self.keep
            wanted = round(patches * min(1.0, share) ** 0.5)
            merged = min(windows, (patches - wanted) // saved) if saved else 0
        return (patches - merged * saved,) * (tower.feature_layer + 1)

    def removed(self, batch: BlockBatch) -> Sequence[int] | None:
        """Return how many patches of each tile go where the windows decide."""
        if self.keep is not None:
            return None
        likeness = window_likeness(batch.hidden[:, batch.leading :], self.window)
        saved = self.window[0] * self.window[1] - 1
        counts: list[int] = (likeness >= self.merge_threshold).sum(1).tolist()
        return [(min(counts) if self.faithful else count) * saved for count in counts]

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Merge the likest windows of every tile."""
        if batch.removes is None:
            return merge_windows(batch.hidden, batch.leading, self.window, batch.remove)
        outputs = batch.hidden.shape[1] - batch.remove
        tiles = [
            padded(merge_windows(hidden[None], batch.leading, self.window, remove), outputs)
            for hidden, remove in zip(batch.hidden, batch.removes, strict=True)
        ]
        return Reduction(
            values=torch.cat([tile.values for tile in tiles]),
            groups=torch.cat([tile.groups for tile in tiles]),
            targets=torch.cat([tile.targets for tile in tiles]),
            sizes=torch.cat([tile.sizes for tile in tiles if tile.sizes is not None]),
        )

    def reduction_macs(self, shape: BlockShape) -> int:
        """The cosines of all pairs of a window."""
        return shape.tokens * self.window[0] * self.window[1] * shape.dim


def _windows(patches: int, window: tuple[int, int], device: torch.device) -> Tensor:
    """Return the patches of each window, int64 `[windows, patches of a window]`, row by row."""
    side, (rows, columns) = isqrt(patches), window
    grid = torch.arange(patches, device=device).view(side // rows, rows, side // columns, columns)
    return grid.transpose(1, 2).reshape(-1, rows * columns)


def window_likeness(patches: Tensor, window: tuple[int, int]) -> Tensor:
    """Return the mean cosine of different patches of each window of `[tiles, patches, dim]`, fp32 `[tiles, windows]`."""
    rows = torch.nn.functional.normalize(patches.to(torch.float32), dim=-1)
    members = rows[:, _windows(patches.shape[1], window, patches.device)]
    size = members.shape[2]
    cosines = members @ members.transpose(2, 3)
    off = ~torch.eye(size, dtype=torch.bool, device=patches.device)
    return (cosines * off).sum((2, 3)) / max(1, size * (size - 1))


def padded(reduction: Reduction, outputs: int) -> Reduction:
    """Return a reduction with rows of zeros behind it, `outputs` in all; they stand for nothing, at the first token's place."""
    assert reduction.sizes is not None
    missing = outputs - reduction.values.shape[1]
    return Reduction(
        torch.nn.functional.pad(reduction.values, (0, 0, 0, missing)),
        reduction.groups,
        torch.nn.functional.pad(reduction.targets, (0, missing)),
        torch.nn.functional.pad(reduction.sizes, (0, missing)),
    )


def merge_windows(hidden: Tensor, leading: int, window: tuple[int, int], remove: int) -> Reduction:
    """Merge the likest windows of `hidden [tiles, leading + patches, dim]` until `remove` tokens are gone.

    Outputs are the leading tokens, the merged windows by falling likeness (the first among equals), and the other patches.
    """
    tiles, tokens, dim = hidden.shape
    patches, device = hidden[:, leading:], hidden.device
    places = _windows(tokens - leading, window, device)
    size = places.shape[1]
    count = remove // (size - 1)
    order = window_likeness(patches, window).argsort(dim=1, descending=True, stable=True)[:, :count]
    members = places[order]
    merged = torch.zeros(tiles, tokens - leading, dtype=torch.bool, device=device).scatter_(1, members.flatten(1), True)
    left = merged.to(torch.int8).argsort(dim=1, stable=True)[:, : tokens - leading - count * size]
    means = torch.stack([patches[tile, index].to(torch.float32).mean(1) for tile, index in enumerate(members)])
    values = torch.cat(
        [hidden[:, :leading], means.to(hidden.dtype), patches.gather(1, left[..., None].expand(-1, -1, dim))], 1
    )
    groups = torch.empty(tiles, tokens, dtype=torch.int64, device=device)
    groups[:, :leading] = torch.arange(leading, device=device)
    own = torch.arange(count, device=device).repeat_interleave(size).expand(tiles, -1)
    groups[:, leading:].scatter_(1, members.flatten(1), leading + own)
    rest = torch.arange(left.shape[1], device=device).expand(tiles, -1)
    groups[:, leading:].scatter_(1, left, leading + count + rest)
    centre = (window[0] // 2) * window[1] + window[1] // 2
    targets = torch.cat(
        [torch.arange(leading, device=device).expand(tiles, -1), leading + members[..., centre], leading + left], 1
    )
    sizes = torch.ones(tiles, targets.shape[1], device=device)
    sizes[:, leading : leading + count] = size
    return Reduction(values, groups, targets, sizes)
