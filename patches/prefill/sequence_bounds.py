"""Where sequences begin and end in a row, as flash attention is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..calls import LanguageModelCall

SEQUENCE_BOUNDS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")


def one_sequence(language_model: nn.Module, tokens: int, keys: int, device: torch.device) -> dict[str, Any]:
    """Return what makes flash attention take a row as one sequence though its position ids have gaps; else nothing.

    Without a mask transformers looks for gaps, to find the borders of packed prompts. Other backends are given a mask of ones.

    Args:
        language_model: tells the backend.
        tokens: queries of the row.
        keys: its keys, those in the cache included.
        device: where the bounds are wanted.
    """
    if "flash" not in (getattr(language_model.config, "_attn_implementation", None) or ""):
        return {}
    queries, entries = (torch.tensor([0, length], dtype=torch.int32, device=device) for length in (tokens, keys))
    return dict(zip(SEQUENCE_BOUNDS, (queries, entries, tokens, keys), strict=True))


def padding_before(call: LanguageModelCall) -> Tensor | None:
    """Return by how much position ids count the padding before each row's first token, int64 `[batch]`; None if they do not.

    `generate` makes position ids from the mask; in a plain forward of a model with 1-D positions the host counts columns.
    """
    mask = call.model_call.attention_mask
    if mask is None or call.positions.ndim == 3 or call.model_call.inputs.get("position_ids") is not None:
        return None
    before = (mask.cumsum(1) == 0).sum(1)
    return before.to(call.device, non_blocking=True) if bool(before.any()) else None
