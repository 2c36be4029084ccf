"""Ranks of tensor parallelism: all of them keep the tokens that the first one chose."""

from __future__ import annotations

from torch import Tensor


def same_on_all_ranks(kept: Tensor) -> Tensor:
    """Return the first rank's choice, int64 `[tokens]`; how many they are, all ranks know from the sizes of the images."""
    from vllm.distributed import get_tp_group

    group = get_tp_group()
    return kept if group.world_size == 1 else group.broadcast(kept.contiguous(), src=0)
