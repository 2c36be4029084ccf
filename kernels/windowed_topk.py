"""The highest scores of every window, each window with a quota of its own; windows may lie anyhow over the tokens."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.kernels.segmented_topk import ordered_keys, segmented_topk
from vlmprune.kernels.shared.compile_cases import CompileCase
from vlmprune.kernels.shared.implementation import choose_implementation
from vlmprune.kernels.shared.segments import host_integers, on_device


def windowed_topk(
    scores: Tensor,
    windows: Tensor,
    quotas: Sequence[int] | Tensor,
    *,
    total: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return the `quotas[w]` highest scoring tokens of every window `w`, all together in ascending order: int64 `[total]`.

    For windows that are runs of neighbouring tokens (frames, tiles, crops in raster order) `segmented_topk` is enough;
    this is for windows of a grid and other groups whose tokens lie apart. Scores are compared as there: ties to the
    lowest index, NaN last. A window with fewer tokens than its quota gives all it has, and the slots that stay empty
    hold -1, behind all others.

    Args:
        scores: `[tokens]`, any real dtype, any stride.
        windows: int64 `[tokens]`, the window of each token, -1 for a token in none.
        quotas: `[windows]`, 0 or more. A tensor on the GPU needs `total`, and is then not checked.
        total: `sum(quotas)` where `quotas` is a tensor, so that the host need not wait for the GPU.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, dtype, window (torch only) or quota.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if scores.dim() != 1:
        raise ValueError(f"scores must be one-dimensional [tokens]; got shape {tuple(scores.shape)}.")
    if windows.shape != scores.shape or windows.dtype != torch.int64:
        raise ValueError(f"windows must be int64 [{scores.numel()}]; got {windows.dtype} {tuple(windows.shape)}.")
    chosen = choose_implementation(scores.device, implementation)
    if not isinstance(quotas, Tensor) or total is None:
        counts = host_integers(quotas)
        if any(count < 0 for count in counts):
            raise ValueError(f"quotas must not be negative; got {counts}.")
        total, quotas = sum(counts), on_device(counts, scores.device)
    if chosen == "triton":
        return _windowed_topk_triton(scores, windows, quotas, total)
    if scores.numel() and not (int(windows.min()) >= -1 and int(windows.max()) < quotas.numel()):
        raise ValueError(
            f"windows must lie in -1..{quotas.numel() - 1}; got {int(windows.min())}..{int(windows.max())}."
        )
    return windowed_topk_reference(scores, windows, quotas, total)


def windowed_topk_reference(scores: Tensor, windows: Tensor, quotas: Tensor, total: int) -> Tensor:
    """`windowed_topk` in plain torch, for arguments that are already checked."""
    if quotas.numel() == 0:
        return torch.empty(0, dtype=torch.int64, device=scores.device)
    # One sort: by window, the best first within it, and stable for the lowest index.
    keys, tokens = ((windows << 32) - ordered_keys(scores)).sort(stable=True)
    # A key lies up to 2^31 on either side of its window's.
    window = (keys + 2**31 - 1) >> 32
    starts = torch.searchsorted(window, torch.arange(quotas.numel(), device=scores.device))
    rank = torch.arange(tokens.numel(), device=scores.device) - starts[window]
    kept = tokens[(window >= 0) & (rank < quotas[window])]
    return torch.cat([kept.sort().values, kept.new_full((total - kept.numel(),), -1)])


def _windowed_topk_triton(scores: Tensor, windows: Tensor, quotas: Tensor, total: int) -> Tensor:
    """The tokens of a window side by side, then `segmented_topk`; tokens in no window lie in front, with quota 0."""
    device = scores.device
    ordered, by_window = windows.sort(stable=True)
    starts = torch.searchsorted(ordered, torch.arange(quotas.numel() + 1, device=device))
    offsets = torch.cat([starts.new_zeros(1), starts])
    counts = torch.cat([quotas.new_zeros(1), quotas.to(device)])
    local = segmented_topk(scores[by_window], offsets, counts, total=total, implementation="triton")
    # Where the slots of each window begin tells which window a slot belongs to.
    window = torch.searchsorted(counts.cumsum(0), torch.arange(total, device=device), right=True)
    token = by_window[(offsets[window.clamp(max=quotas.numel())] + local.clamp(min=0)).clamp(max=scores.numel() - 1)]
    token = token.masked_fill(local < 0, scores.numel()).sort().values
    return token.masked_fill(token == scores.numel(), -1)


# Only the kernels of `segmented_topk`.
COMPILE_CASES: tuple[CompileCase, ...] = ()
