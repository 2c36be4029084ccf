"""Expedite in plain loops."""

from __future__ import annotations

import math

import torch

from support.plain_methods.reduced_tower import PlainBlock, PlainReduction


def expedite(
    clusters: tuple[int, int],
    tau: float | None = None,
    k: int = 20,
    weights: str = "mean",
    window: int = 5,
    rounds: int = 5,
):
    """The reduction of a square tile to rows times columns of clusters."""

    def reduce(block: PlainBlock) -> PlainReduction:
        first = int(block.cls)
        patches = block.hidden[first:].double()
        side = math.isqrt(len(patches))
        rows, columns = clusters

        def cell(index: int, cells: int) -> range:
            return range(index * side // cells, -((-(index + 1) * side) // cells))

        means, middles = [], []
        for row in range(rows):
            for column in range(columns):
                inside = [r * side + c for r in cell(row, rows) for c in cell(column, columns)]
                means.append(patches[inside].mean(0))
                middles.append((2 * row + 1) * side // (2 * rows) * side + (2 * column + 1) * side // (2 * columns))
        centers = torch.stack(means)
        used = tau
        if used is None:
            nearest = [min(float(((patch - center) ** 2).sum()) for center in centers) for patch in patches]
            used = 5 / sorted(nearest)[(len(nearest) - 1) // 2]
        for _ in range(rounds):
            shares = torch.zeros(len(patches), len(centers), dtype=torch.float64)
            for place, patch in enumerate(patches):
                own_row, own_column = place // side * rows // side, place % side * columns // side
                for cluster in range(len(centers)):
                    near = max(abs(cluster // columns - own_row), abs(cluster % columns - own_column)) <= window // 2
                    if near:
                        shares[place, cluster] = math.exp(-used * float(((patch - centers[cluster]) ** 2).sum()))
            shares = shares / shares.sum(1, keepdim=True)
            centers = (shares.T @ patches) / shares.sum(0)[:, None]
        back = torch.zeros(len(block.hidden), first + len(centers), dtype=torch.float64)
        for place, patch in enumerate(patches):
            near = torch.stack([torch.exp(-used * ((patch - center) ** 2).sum()) for center in centers])
            least = near.sort(descending=True).values[min(k, len(near)) - 1] if k >= 0 else 0.0
            near = near * (near >= least)
            back[first + place, first:] = near / (near.sum() if weights == "mean" else near.norm())
        if first:
            back[0, 0] = 1.0
        values = torch.cat([block.hidden[:first].double(), centers]).float()
        places = [*range(first), *(first + middle for middle in middles)]
        return PlainReduction(values, back.float(), places, [1.0] * len(values))

    return reduce
