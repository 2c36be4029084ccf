"""Clusters around density peaks (DPC-kNN, as token clustering uses it)."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.segmented_topk import segmented_topk


def density_peaks(features: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Cluster tokens around those that are dense and far from denser ones.

    The density of a token is `exp(-mean(d ** 2))` over its `clusters` nearest tokens, itself included, d the L2 distance over the
    root of the width; its score is the density times the distance to the nearest denser token (the largest of all where there
    is none). The highest scores are centres, and every token goes to the nearest centre; ties go to the lowest index.

    Args:
        features: `[tokens, dim]`.
        clusters: number of clusters, 1 to `tokens`.

    Returns:
        Int64 `[clusters]`, the centres by falling score, and int64 `[tokens]`, the cluster of each token.
    """
    values = features.float()
    # The difference formula: products of rows of large norm would drown small distances.
    distances = torch.cdist(values, values, compute_mode="donot_use_mm_for_euclid_dist") / values.shape[1] ** 0.5
    nearest = distances.topk(clusters, dim=1, largest=False).values
    density = (-(nearest**2).mean(1)).exp()
    denser = density[None, :] > density[:, None]
    apart = distances.masked_fill(~denser, distances.max()).amin(1)
    centres = segmented_topk(apart * density, (0, len(values)), (clusters,), order="score")
    groups = distances[centres].argmin(0)
    return centres, groups.index_copy(0, centres, torch.arange(clusters, device=groups.device))
