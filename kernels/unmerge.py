"""Put merged tokens back where their parts came from."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.compact import compact
from vlmprune.kernels.shared.compile_cases import CompileCase


def unmerge(merged: Tensor, groups: Tensor, *, implementation: str | None = None) -> Tensor:
    """Return `merged[b, groups[b, t]]`: each token gets a copy of what it was merged into, `[batch, tokens, ...]`.

    The inverse of a merge as far as there is one: tokens that were merged with none come back as they were.

    Args:
        merged: `[batch, outputs, ...]`, any dtype up to 8 bytes an element and any strides.
        groups: int64 `[batch, tokens]`, the output each token went into, -1 for a dropped token, which gets 0. On a GPU
            an index beyond the outputs is not checked and gets 0 too.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape or dtype.
        IndexError: a group outside -1..outputs - 1 (torch only).
        KernelUnavailableError: the forced implementation cannot run.
    """
    if groups.dim() != 2 or groups.dtype != torch.int64 or merged.dim() < 2 or merged.shape[0] != groups.shape[0]:
        raise ValueError(
            "merged must be [batch, outputs, ...] and groups int64 [batch, tokens] of the same batch; "
            f"got {tuple(merged.shape)} and {groups.dtype} {tuple(groups.shape)}."
        )
    return compact([merged], groups, implementation=implementation)[0]


# Only the kernel of `compact`.
COMPILE_CASES: tuple[CompileCase, ...] = ()
