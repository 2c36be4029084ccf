"""Farthest-point choice of tokens by any distance, from its matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.max_min import greedy_max_min, loop_warps, max_min_kernel
from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.cosine_matrix import LAST, ROW_ALIGNMENT, TILE, row_stride
from vlmprune.kernels.shared.implementation import choose_implementation, triton
from vlmprune.kernels.shared.segments import check_counts, check_seeds, on_device


def max_min_from_distances(
    distances: Tensor, k: int, *, seed: int | None = None, implementation: str | None = None
) -> Tensor:
    """Return `k` rows of a distance matrix by the rule of `max_min`: int64 `[k]` in pick order.

    `distances[s, j]` is the distance of token `j` from a chosen `s`; the diagonal is not read. A token with
    a NaN distance to a chosen one is chosen after all others.

    Args:
        distances: `[tokens, tokens]`, any real dtype, compared in fp32.
        k: number of picks, 0..tokens.
        seed: first pick; None for the token whose nearest other token is farthest.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, count or seed.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if distances.dim() != 2 or distances.shape[0] != distances.shape[1]:
        raise ValueError(f"distances must be square [tokens, tokens]; got shape {tuple(distances.shape)}.")
    tokens = distances.shape[0]
    (count,) = check_counts([k], [0, tokens])
    chosen = choose_implementation(distances.device, implementation)
    if seed is not None:
        (seed,) = check_seeds([seed], [0, tokens])
    if count == 0:
        return torch.empty(0, dtype=torch.int64, device=distances.device)
    affinity = torch.nan_to_num(-distances.to(torch.float32), nan=LAST, posinf=LAST, neginf=-LAST)
    affinity.fill_diagonal_(-LAST)
    if chosen == "triton":
        first = affinity.amax(0).argmin() if seed is None else on_device([seed], distances.device)
        return _from_matrix_triton(affinity, first, count)
    if seed is None:
        seed = int(affinity.amax(0).argmin())
    return greedy_max_min(affinity.__getitem__, seed, count, None, None)


def _from_matrix_triton(affinity: Tensor, first: Tensor, k: int) -> Tensor:
    tokens = affinity.shape[0]
    padded = torch.empty(tokens, row_stride(tokens), dtype=torch.float32, device=affinity.device)
    padded[:, :tokens] = affinity
    picks = torch.empty(k, dtype=torch.int64, device=affinity.device)
    table = on_device([0, tokens, k, 0, 0, 0], affinity.device)
    block = max(16, triton.next_power_of_2(tokens))
    max_min_kernel[(1,)](
        *(padded, padded, padded, first.view(1), padded, table, picks),
        BLOCK=block, TILE=TILE, ALIGNMENT=ROW_ALIGNMENT, SEEDED=True, SCALED=False, WEIGHTED=False, num_warps=loop_warps(block),
    )  # fmt: skip
    return picks


COMPILE_CASES = (
    CompileCase("2880", _from_matrix_triton, (Like(torch.float32, (2880, 2880)), Like(torch.int64, (1,)), 320)),
)
