"""Expedite's two halves: tokens clustered on their grid, and put back on it as mixtures of the refined clusters."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import adaptive_avg_pool2d, normalize

Grid = tuple[int, int]


def first_clusters(grid: Grid, clusters: Grid) -> Tensor:
    """Return the cluster that each token of a `(height, width)` grid begins in, both row by row: int64 `[tokens]`."""
    (height, width), (rows, columns) = grid, clusters
    row = torch.arange(height) * rows // height
    column = torch.arange(width) * columns // width
    return (row[:, None] * columns + column).flatten()


def cluster_places(grid: Grid, clusters: Grid) -> Tensor:
    """Return the token in the middle of every cell of the coarser grid, int64 `[clusters]`, no token twice."""
    row, column = ((torch.arange(some) * 2 + 1) * all_ // (2 * some) for some, all_ in zip(clusters, grid, strict=True))
    return (row[:, None] * grid[1] + column).flatten()


@lru_cache(maxsize=32)
def _out_of_reach(grid: Grid, clusters: Grid, window: int, device: torch.device) -> Tensor:
    """Return which tokens a cluster may not take, bool `[tokens, clusters]`: it looks `window // 2` clusters around."""
    first, columns = first_clusters(grid, clusters), clusters[1]
    every = torch.arange(clusters[0] * columns)
    rows = first[:, None] // columns - every // columns
    across = first[:, None] % columns - every % columns
    return (torch.maximum(rows.abs(), across.abs()) > window // 2).to(device)


def pooled_centroids(tokens: Tensor, grid: Grid, clusters: Grid) -> Tensor:
    """Return the means of the cells of the coarser grid, fp32 `[batch, clusters, dim]`, from `[batch, tokens, dim]`."""
    planes = tokens.float().transpose(1, 2).unflatten(2, grid)
    return adaptive_avg_pool2d(planes, clusters).flatten(2).transpose(1, 2)


def cluster_centroids(
    tokens: Tensor, grid: Grid, clusters: Grid, tau: float | Tensor, iterations: int = 5, window: int = 5
) -> Tensor:
    """Return the centroids of a soft k-means in which every token belongs to the clusters around it.

    Args:
        tokens: `[batch, tokens, dim]`, row by row over `grid`.
        grid: rows and columns of the tokens.
        clusters: rows and columns of the clusters.
        tau: what squared distances are multiplied with; `[batch]` or one number.
        iterations: rounds, 0 for the pooled centroids.
        window: how many clusters, across and down, share a token; odd.

    Returns:
        Centroids, fp32 `[batch, clusters, dim]`.
    """
    rows = tokens.float()
    centroids = pooled_centroids(rows, grid, clusters)
    tau = torch.as_tensor(tau, device=rows.device).view(-1, 1, 1)
    hidden = _out_of_reach(grid, clusters, window, rows.device)
    for _ in range(iterations):
        logits = (squared_distances(rows, centroids) * -tau).masked_fill_(hidden, -torch.inf)
        shares = logits.softmax(-1)
        taken = shares.sum(1)[..., None].clamp(min=1e-16)
        centroids = shares.transpose(1, 2) @ rows / taken
    return centroids


def squared_distances(tokens: Tensor, centroids: Tensor) -> Tensor:
    """Return squared distances `[batch, tokens, clusters]`; 0 or more, whatever is rounded."""
    # Features of a tower have much in common, against which their differences would be rounded.
    middle = centroids.mean(1, keepdim=True)
    tokens, centroids = tokens - middle, centroids - middle
    lengths = tokens.square().sum(-1)[..., None] + centroids.square().sum(-1)[:, None]
    return torch.baddbmm(lengths, tokens, centroids.transpose(1, 2), alpha=-2).clamp_(min=0)


def nearest_clusters(tokens: Tensor, centroids: Tensor) -> Tensor:
    """Return the nearest centroid of every token, int64 `[batch, tokens]`, the first among equals."""
    return squared_distances(tokens.float(), centroids).argmin(-1)


def suggested_tau(tokens: Tensor, centroids: Tensor) -> Tensor:
    """Return `5 / median(squared distance to the nearest centroid)`, `[batch]`: it follows the scale of the features."""
    nearest = squared_distances(tokens.float(), centroids).amin(-1)
    return 5.0 / nearest.median(-1).values.clamp(min=1e-12)


def reconstruct(
    tokens: Tensor,
    centroids: Tensor,
    refined: Tensor,
    tau: float | Tensor,
    k: int = 20,
    weights: Literal["mean", "l2"] = "mean",
) -> Tensor:
    """Return every token as a mixture of refined clusters, `[batch, tokens, dim]`.

    A token weighs a cluster by `exp(-tau d)`, d its squared distance to the centroid when the clusters were made. The
    largest d that matters is taken off all of them first, so that a far token keeps its weights where they underflow in
    the official code.

    Args:
        tokens: `[batch, tokens, dim]`, as they were clustered.
        centroids: `[batch, clusters, dim]` of them.
        refined: `[batch, clusters, dim]`, what the later layers made of the clusters; their dtype is the result's.
        tau: as in `cluster_centroids`; `[batch]` or one number.
        k: how many clusters a token is made of (more where distances are equal); all where negative.
        weights: "mean" for weights that sum to one, "l2" for the official codes' length of one.
    """
    distances = squared_distances(tokens.float(), centroids.float())
    nearness = -torch.as_tensor(tau, device=distances.device).view(-1, 1, 1) * distances
    if 0 <= k < centroids.shape[1]:
        least = nearness.topk(k, dim=-1).values[..., -1:]
        nearness = nearness.masked_fill(nearness < least, -torch.inf)
    shares = (
        normalize((nearness - nearness.amax(-1, keepdim=True)).exp(), dim=-1)
        if weights == "l2"
        else nearness.softmax(-1)
    )
    return (shares @ refined.float()).to(refined.dtype)
