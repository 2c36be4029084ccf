"""PixelPrune: patches that their neighbours predict are dropped before the vision tower."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError
from vlmprune.kernels.unpredicted_tokens import unpredicted_tokens
from vlmprune.methods.adaptive_method import AdaptiveMethod
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_number
from vlmprune.methods.needs import PIXELS, STILL_IMAGES, Need
from vlmprune.methods.selection_macs import Scored

Metric = Literal["max", "mae", "rmse", "exact"]
Scan = Literal["pred_2d", "raster", "serpentine"]

# Rounds in which the tolerance is halved towards a budget; the largest difference of pixels of 8 bits comes in steps of 1/255,
# and needs no finer ones.
ROUNDS = 24
FINE_ENOUGH = 1 / 512


@dataclass(frozen=True, kw_only=True)
class PixelPrune(AdaptiveMethod):
    """Drop the visual tokens whose pixels their neighbours predict, before the vision tower sees them.

    The pixels of a visual token (2 x 2 patches, first frame, values in [0, 1]) are predicted by its left, upper and upper left
    neighbour: by the upper one where the upper left is like the left and not like the upper, else by the left one. A token
    within `tau` of its prediction is dropped: the blocks of the tower run without its patches, and it never enters the
    language model. Everything else keeps its place: patch positions are those of the whole grid, M-RoPE ids those of the
    whole prompt, DeepStack features follow the kept tokens. Pictures with flat areas (documents, screenshots) lose
    half and more of their tokens; in photographs hardly two tokens are equal.

    `keep=None` (the default) drops what is predicted. A given `keep` is met exactly: the tolerance is raised until so many or
    fewer tokens stay, and of those that the last step dropped the first ones stay too; where fewer are unpredicted at `tau`
    already, predicted ones stay in even steps. It is one for all rows of a batch. Features of dropped tokens, which
    nobody should read, are those of the kept token before them.

    Source: "PixelPrune: Pixel-Level Adaptive Visual Token Reduction via Predictive Coding", arXiv 2604.00886, whose official
    code has Qwen3-VL alone and no `keep`. Qwen2-VL and Qwen2.5-VL are ours: there windows keep their tokens, and empty
    windows go. Of the two official codes this follows the one for transformers; the one for vLLM lets text move up when
    the last rows are dropped. The official option to drop behind a later block is left out. Values in [0, 1] are made by
    the usual mean and deviation of the family's processor, which matters with `tau` alone.

    Attributes:
        tau: tolerance, of pixel values in [0, 1]; 0 drops equal pixels only.
        metric: "max", "mae" (mean) or "rmse" of the differences of two tokens; "exact" is "max" without tolerance.
        scan: "pred_2d" as above; "raster" or "serpentine" compare with the last kept token, row by row.
        anchored: whether a predicted neighbour counts as its prediction, so that small differences cannot add up.
    """

    tau: float = 0.0
    metric: Metric = "max"
    scan: Scan = "pred_2d"
    anchored: bool = True

    name: ClassVar[str] = "pixelprune"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, PIXELS})
    symbols: ClassVar[Mapping[str, str]] = {
        "threshold": "tau=",
        "method": "scan=",
        "PIXELPRUNE_THRESHOLD": "tau=",
        "PIXELPRUNE_METRIC": "metric=",
        "PIXELPRUNE_METHOD": "scan=",
        "PIXELPRUNE_ANCHORED": "anchored=",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, "[0, 1]", "of pixel values in [0, 1]")
        check_choice("metric", self.metric, get_args(Metric))
        check_choice("scan", self.scan, get_args(Scan))
        check_flag("anchored", self.anchored)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for what was chosen before the tower."""
        return (VisionSignal("kept_pixels", 0),)

    def choose_pixels(self, pixels: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Choose the tokens of every image in `pixels`, `[tokens, values]`."""
        if self.keep is None:
            return self.unpredicted(pixels, grids, self.tau)
        images = pixels.split([rows * columns for rows, columns in grids])
        return torch.cat([self._meet(image, grid) for image, grid in zip(images, grids, strict=True)])

    def select(self, batch: VisualBatch) -> Selection:
        """Keep what was chosen before the tower."""
        (signal,) = self.vision_signals(batch.tower)
        parts = [part.nonzero()[:, 0] for part in batch.vision[signal].split(list(batch.counts))]
        counts = tuple(len(part) for part in parts)
        if self.keep is not None and counts != batch.budgets:
            raise UnsupportedCallError(
                f"The images were encoded for {list(counts)} kept tokens, and this call asks for {list(batch.budgets)}: "
                f"{self.name!r} drops tokens before the tower, with one keep for all rows. Encode and call with the same."
            )
        return Selection(kept=torch.cat(parts).to(batch.features.device), counts=counts)

    def feature_macs(self, scored: Scored) -> int:
        """Differences and comparisons alone."""
        return 0

    def unpredicted(self, pixels: Tensor, grids: list[tuple[int, int]], tau: float) -> Tensor:
        """Return which tokens are not predicted at a tolerance, bool `[tokens]`."""
        exact = self.metric == "exact"
        return unpredicted_tokens(
            pixels,
            grids,
            tau=0.0 if exact else tau,
            metric="max" if exact else self.metric,
            scan=self.scan,
            anchored=self.anchored,
        )

    def _meet(self, pixels: Tensor, grid: tuple[int, int]) -> Tensor:
        """Return the choice of one image, as many tokens as the budget asks for."""
        total = len(pixels)
        budget = self.budget(total)
        kept = self.unpredicted(pixels, [grid], self.tau)
        missing = budget - int(kept.sum())
        if missing < 0:
            # "exact" has no tolerance to raise, and takes the first of those it has.
            low, high = self.tau, max(1.0, float(pixels.max() - pixels.min()))
            more, kept = kept, torch.zeros_like(kept)
            kept[0] = True
            for _ in range(ROUNDS if self.metric != "exact" else 0):
                if self.metric == "max" and high - low < FINE_ENOUGH:
                    break
                middle = (low + high) / 2
                some = self.unpredicted(pixels, [grid], middle)
                if int(some.sum()) > budget:
                    low, more = middle, some
                else:
                    high, kept = middle, some
                    if int(some.sum()) == budget:
                        break
            others = (more & ~kept).nonzero()[:, 0][: budget - int(kept.sum())]
        else:
            rest = (~kept).nonzero()[:, 0]
            others = rest[(torch.arange(missing, device=rest.device) * 2 + 1) * len(rest) // max(1, 2 * missing)]
        kept[others] = True
        return kept
