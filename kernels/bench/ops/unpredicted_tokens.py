"""`unpredicted_tokens` against the scan token by token, as PixelPrune's published code makes it."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import Case, Contender, Plan
from vlmprune.kernels.unpredicted_tokens import unpredicted_tokens

TAU = 0.02


def screenshot(rows: int, columns: int, dim: int, device: str) -> Tensor:
    """Tokens of flat areas in a few colours, one in ten with something on it, `[rows * columns, dim]`."""
    colours = torch.rand(8)[torch.randint(8, (rows // 4 + 1, columns // 4 + 1))]
    flat = colours.repeat_interleave(4, 0).repeat_interleave(4, 1)[:rows, :columns].reshape(-1, 1)
    drawn = (torch.rand(rows * columns, 1) < 0.1) * torch.rand(rows * columns, dim)
    return (flat + drawn).to(device)


def scan(values: Tensor, columns: int, tau: float) -> Tensor:
    """The anchored 2-D prediction, one token after the other."""
    seen = values.clone()
    kept = torch.ones(len(values), dtype=torch.bool)

    def alike(first: Tensor, second: Tensor) -> bool:
        return float((first - second).abs().max()) <= tau

    for token in range(1, len(values)):
        row, column = divmod(token, columns)
        if row == 0:
            prediction = seen[token - 1]
        elif column == 0:
            prediction = seen[token - columns]
        else:
            left, above, corner = seen[token - 1], seen[token - columns], seen[token - columns - 1]
            prediction = above if alike(corner, left) and not alike(corner, above) else left
        if alike(values[token], prediction):
            kept[token], seen[token] = False, prediction.clone()
    return kept


def plan(case: Case) -> Plan:
    rows = math.isqrt(case.tokens)
    columns = case.tokens // rows
    images = torch.cat([screenshot(rows, columns, case.dim, case.device) for _ in range(case.batch)])
    grids = [(rows, columns)] * case.batch
    return images.nbytes, [
        Contender("ours", f"tau {TAU}", lambda: unpredicted_tokens(images, grids, tau=TAU)),
        Contender("ours, exact", "tau 0", lambda: unpredicted_tokens(images, grids)),
        Contender(
            "official", "token by token", lambda: [scan(image, columns, TAU) for image in images.split(rows * columns)]
        ),
    ]


def check(device: str) -> bool:
    image = screenshot(13, 22, 48, "cpu") + 0.015 * torch.rand(13 * 22, 1)
    kept = unpredicted_tokens(image.to(device), [(13, 22)], tau=TAU)
    return torch.equal(kept.cpu(), scan(image, 22, TAU)) and 0 < int(kept.sum()) < len(image)
