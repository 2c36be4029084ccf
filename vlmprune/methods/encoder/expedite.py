"""Expedite: from one block on the tower runs on clusters of neighbouring tokens, and their tokens come back behind it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.budget import token_budget
from vlmprune.errors import BudgetError, ParameterError
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_choice, check_int, check_number
from vlmprune.methods.encoder.expedite_clusters import (
    Grid,
    cluster_centroids,
    cluster_places,
    nearest_clusters,
    pooled_centroids,
    reconstruct,
    suggested_tau,
)
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Place, Reduction
from vlmprune.methods.needs import ANY_TOWER_BLOCKS, Need

# Where the paper clusters most often: before layer 10 of the 24 of its Segmenter.
DEPTH = 10 / 24

# The share of tokens that its smallest clusters are (20 x 20 of 40 x 40).
QUARTER = 1 / 4


@dataclass(frozen=True, kw_only=True)
class Expedite(EncoderMethod):
    """Cluster the patches once, before block `layer`, to a coarser grid of soft k-means centroids, which the later blocks run on.

    Every patch belongs to the clusters around its place, by `exp(-tau d)` of its squared distances d, in `iterations` rounds from
    the means of the coarser grid's cells on. With `output="full"` each patch becomes a mixture of the `k` nearest clusters again
    behind the tower, by the distances it had when they were made; with "merged" the clusters themselves go to the projector, on
    their grid, row by row. The CLS token passes. All in fp32; attention is untouched. In a tower over packed pictures (Qwen2-VL
    and later) whole visual tokens are clustered, frame by frame, and a cluster has the rotary positions and the window of the
    token in the middle of its cell.

    `keep` fixes the clusters: with "merged" there are just so many, on the grid of rows and columns whose shape is nearest to the
    tower's (a number without two such factors is refused, and the nearest one named). With "full", where the average over the
    blocks counts, `layer` is the one after which about a quarter of the patches as clusters meets it, if not given, and the
    clusters are the most square ones that do not exceed `keep` by more than half a row. Or `clusters` and `layer` say it
    themselves.

    Source: "Expediting Large-Scale Vision Transformer for Dense Prediction without Fine-tuning", arXiv 2210.01035, tested there
    on towers for segmentation, detection and depth, not in front of a language model. The paper's mixture is a mean, the
    official codes scale its weights to length one instead (`weights="l2"`), which makes outputs up to sqrt(k) times as large.
    Segmenter's settings are layer 10 of 24, 28 x 28 of 40 x 40 clusters, tau 0.02, window 5, 5 rounds, k 20; `tau` depends on the
    size of the tower's features and is by default 5 over the median squared distance of a tile's patches to the nearest
    cell's mean.

    Attributes:
        clusters: rows and columns of the clusters, instead of `keep`.
        layer: 0-based block before which patches are clustered (the official `location` of Segmenter plus one).
        tau: what squared distances are multiplied with, the official `temperature`; larger is harder.
        iterations: rounds of k-means.
        window: how many clusters, across and down, share a patch; odd.
        k: clusters that a patch is mixed of behind the tower; -1 for all.
        weights: "mean" for weights that sum to one, "l2" for the official codes' length of one.
    """

    clusters: tuple[int, int] | None = None
    layer: int | None = None
    tau: float | None = None
    iterations: int = 5
    window: int = 5
    k: int = 20
    weights: Literal["mean", "l2"] = "mean"

    name: ClassVar[str] = "expedite"
    needs: ClassVar[frozenset[Need]] = frozenset({ANY_TOWER_BLOCKS})
    symbols: ClassVar[Mapping[str, str]] = {
        "alpha": "layer=, 0-based, before which patches are clustered",
        "location": "layer=, one more than Segmenter's and DPT's",
        "temperature": "tau=",
        "n_iters": "iterations=",
        "window_size": "window=",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.clusters is not None:
            given = self.clusters
            if not (isinstance(given, (tuple, list)) and len(given) == 2):
                raise ParameterError(f"clusters={given!r}; allowed: (rows, columns).")
            for name, value in zip(("clusters[0]", "clusters[1]"), given, strict=True):
                check_int(name, value, 1)
            object.__setattr__(self, "clusters", (given[0], given[1]))
            if self.keep is not None:
                raise ParameterError(
                    f"keep={self.keep!r} and clusters={self.clusters!r} both say how many clusters; give one."
                )
        elif self.keep is None:
            object.__setattr__(self, "keep", 0.5 if self.output == "full" else 0.25)
        if self.layer is not None:
            check_int("layer", self.layer, 0)
        if self.tau is not None:
            check_number("tau", self.tau, "(0, inf)")
        check_int("iterations", self.iterations, 0)
        check_int("window", self.window, 1)
        if self.window % 2 == 0:
            raise ParameterError(
                f"window={self.window}; allowed: an odd number of clusters; nearest: {self.window + 1}."
            )
        check_int("k", self.k, -1)
        if self.k == 0:
            raise ParameterError("k=0; allowed: 1 or more clusters, or -1 for all.")
        check_choice("weights", self.weights, ("mean", "l2"))

    @property
    def place(self) -> Place:
        """Before a block."""
        return "before attention"

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return all patches up to `layer`, and the clusters from there on."""
        side = math.isqrt(patches)
        if side * side == patches:
            return self.plan_of_grid((side, side), tower)
        if self.keep is not None and token_budget(self.keep, patches) == patches:
            return (patches,) * (tower.feature_layer + 1)
        raise ParameterError(f"method=expedite clusters square tiles; this tower's have {patches} patches.")

    def plan_of_grid(self, grid: Grid, tower: TowerFacts) -> tuple[int, ...]:
        """Return the same for a picture of `(rows, columns)` tokens."""
        blocks, patches = tower.feature_layer + 1, grid[0] * grid[1]
        if self.keep is not None and token_budget(self.keep, patches) == patches:
            return (patches,) * blocks
        if self.layer is not None and self.layer >= blocks:
            raise ParameterError(
                f"layer={self.layer}; allowed: 0..{blocks - 1}, the blocks before this tower's features; nearest: {blocks - 1}."
            )
        layer = self.layer if self.layer is not None else min(blocks - 1, round(DEPTH * tower.layers))
        if self.clusters is not None:
            rows, columns = self.clusters
            if rows > grid[0] or columns > grid[1]:
                nearest = (min(rows, grid[0]), min(columns, grid[1]))
                raise ParameterError(f"clusters={self.clusters}; allowed: up to {grid}; nearest: {nearest}.")
            count = rows * columns
        elif self.output == "merged":
            count = self._exact_count(grid)
        else:
            layer, count = self._average(grid, blocks)
        return (patches,) * layer + (count,) * (blocks - layer)

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Cluster the patches of every tile."""
        if batch.grid is None:
            raise ParameterError("method=expedite needs the grid of the patches, which this tower's tiles do not have.")
        first, grid = batch.leading, batch.grid
        tokens = batch.hidden[:, first : first + batch.patches].float()
        clusters = self.clusters or grid_of(batch.patches - batch.remove, grid)
        assert clusters is not None
        tau: float | Tensor = self.tau or suggested_tau(tokens, pooled_centroids(tokens, grid, clusters))
        centroids = cluster_centroids(tokens, grid, clusters, tau, self.iterations, self.window)
        leading = batch.hidden[:, :first]
        own = torch.arange(first, device=tokens.device).expand(len(tokens), -1)
        groups = torch.cat([own, nearest_clusters(tokens, centroids) + first], 1)
        places = cluster_places(grid, clusters).to(tokens.device) + first

        def restore(later: Tensor) -> Tensor:
            mixed = reconstruct(tokens, centroids, later[:, first:], tau, self.k, self.weights)
            return torch.cat([later[:, :first], mixed], 1)

        return Reduction(
            values=torch.cat([leading, centroids.to(leading.dtype)], 1),
            groups=groups,
            targets=torch.cat([own, places.expand(len(tokens), -1)], 1),
            restore=restore,
        )

    def reduction_macs(self, shape: BlockShape) -> int:
        """Distances and means of every round, distances for `tau`, and those that the record tells the nearest clusters by."""
        passes = 2 * self.iterations + 1 + (self.tau is None)
        return passes * (shape.tokens - shape.leading) * (shape.outputs - shape.leading) * shape.dim

    def restoring_macs(self, shape: BlockShape) -> int:
        """Distances and mixtures."""
        return 2 * (shape.tokens - shape.leading) * (shape.outputs - shape.leading) * shape.dim

    def _exact_count(self, grid: Grid) -> int:
        assert self.keep is not None
        patches = grid[0] * grid[1]
        count = token_budget(self.keep, patches)
        if grid_of(count, grid) is None:
            near = min(
                (other for other in range(1, patches + 1) if grid_of(other, grid)),
                key=lambda other: abs(other - count),
            )
            raise BudgetError(
                f"keep={self.keep!r} asks for {count} clusters, which have no rows and columns within {grid}; "
                f"nearest: keep={near}."
            )
        return count

    def _average(self, grid: Grid, blocks: int) -> tuple[int, int]:
        assert self.keep is not None
        patches, (height, width) = grid[0] * grid[1], grid
        share = self.keep if isinstance(self.keep, float) else min(1.0, self.keep / patches)
        least = 1 / patches
        layer = self.layer
        if layer is None:
            layer = max(0, min(blocks - 1, math.floor((share - QUARTER) / (1 - QUARTER) * blocks + 0.5)))
            # So many blocks before it must leave room for the clusters.
            while layer and (share * blocks - layer) / (blocks - layer) < least:
                layer -= 1
        wanted = (share * blocks - layer) / (blocks - layer) * patches
        if wanted < 1 - 0.5 / min(grid):
            nearest = math.ceil((layer + (blocks - layer) * least) / blocks * 1e4) / 1e4
            raise BudgetError(
                f"keep={self.keep!r} on average over {blocks} blocks cannot be reached by clusters before block {layer}; "
                f"nearest: keep={nearest:g}."
            )
        alike = [
            (rows, columns)
            for rows in range(1, height + 1)
            for columns in (rows * width // height, rows * width // height + 1)
            if 1 <= columns <= width
        ]
        rows, columns = min(alike, key=lambda some: abs(some[0] * some[1] - wanted))
        return layer, rows * columns


def grid_of(count: int, grid: Grid) -> Grid | None:
    """Return the rows and columns of `count` clusters whose shape is nearest to that of `grid`; None where they do not fit it."""
    height, width = grid
    fits = [(rows, count // rows) for rows in range(1, height + 1) if count % rows == 0 and count // rows <= width]
    return min(fits, key=lambda some: abs(math.log(some[0] * width / (some[1] * height))), default=None)
