"""Where sequences begin and end in a row, as flash attention is told."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

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
