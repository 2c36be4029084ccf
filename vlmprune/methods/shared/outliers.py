"""Local outlier factor of numbers (Breunig et al., 2000), as scikit-learn computes it for one column."""

from __future__ import annotations

import torch
from torch import Tensor

# What scikit-learn adds to the mean reachability distance.
EPSILON = 1e-10
# Above this factor a point is an outlier ("auto" contamination).
THRESHOLD = 1.5


def local_outlier_factor(values: Tensor, neighbours: int) -> Tensor:
    """Return the local outlier factor of every value, fp64 `[values]`: about 1 where it lies as densely as its neighbours.

    Args:
        values: `[values]`.
        neighbours: how many nearest others are looked at; all others where there are fewer.
    """
    total = len(values)
    number = min(neighbours, total - 1)
    if number < 1:
        return torch.ones(total, dtype=torch.float64, device=values.device)
    ordered, order = values.double().sort(stable=True)
    # The nearest of a sorted value lie within that many places at either side.
    steps = torch.arange(-number, number + 1, device=values.device)
    steps = steps[steps != 0]
    places = torch.arange(total, device=values.device)[:, None] + steps
    inside = (places >= 0) & (places < total)
    places = places.clamp(0, total - 1)
    distances = (ordered[places] - ordered[:, None]).abs().masked_fill(~inside, torch.inf)
    nearest, chosen = distances.topk(number, largest=False)
    places = places.gather(1, chosen)
    reach = torch.maximum(nearest, nearest[:, -1][places])
    density = 1.0 / (reach.mean(1) + EPSILON)
    factor = density[places].mean(1) / density
    return torch.empty_like(factor).index_copy_(0, order, factor)


def outlier_share(values: Tensor, neighbours: int) -> float:
    """Return the share of `values [values]` that are outliers, high ones and low ones together; waits for the device."""
    return int((local_outlier_factor(values, neighbours) > THRESHOLD).sum()) / max(1, len(values))
