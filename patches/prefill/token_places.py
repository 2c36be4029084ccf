"""Where certain tokens stand in a call, whether it has ids or embeddings."""

from __future__ import annotations

from collections.abc import Callable, Collection

import torch
from torch import Tensor

from ..calls import LanguageModelCall


def token_places(call: LanguageModelCall, wanted: Collection[int], embed: Callable[[Tensor], Tensor]) -> Tensor:
    """Return where the tokens `wanted` stand, bool `[batch, columns]` on the CPU.

    Args:
        call: the call in the caller's columns.
        wanted: token ids.
        embed: embeds ids, to tell those tokens where the call has embeddings in place of ids.
    """
    ids = call.model_call.inputs.get("input_ids")
    sought = torch.tensor(sorted(wanted), dtype=torch.int64)
    if ids is not None:
        return torch.isin(ids[:, -call.columns :].cpu(), sought)
    if not wanted:
        return torch.zeros(call.batch, call.columns, dtype=torch.bool)
    marks = embed(sought).to(call.tokens)
    return torch.stack([(call.tokens == mark).all(-1) for mark in marks]).any(0).cpu()
