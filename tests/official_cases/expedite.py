"""Cases of Expedite's clustering and reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.encoder.expedite_clusters import (
    cluster_centroids,
    first_clusters,
    nearest_clusters,
    pooled_centroids,
    reconstruct,
)


def expedite(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Tokens on a grid, and stand-ins of what later layers make of the clusters."""
    grid, clusters = (params["H"], params["W"]), tuple(params["clusters_hw"])
    tokens, tau = inputs["x"].flatten(2).transpose(1, 2), params["temperature"]
    centroids = cluster_centroids(tokens, grid, clusters, tau, params["n_iters"], params["window_size"])
    return {
        "centroids0": pooled_centroids(tokens, grid, clusters),
        "centroids": centroids,
        "init_label": first_clusters(grid, clusters).expand(len(tokens), -1),
        "hard_labels": nearest_clusters(tokens, centroids),
        "recon": reconstruct(tokens, centroids, inputs["z"], tau, params["recon_k"], weights="l2"),
    }


RUNS = {"expedite": expedite}
