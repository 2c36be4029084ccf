"""How much position visual tokens carry, from the rotary tables of the language model."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods.shared.rotary_coordinates import rotary_tables, table_means

from .families.family import Family


def check_rotary(family: Family, name: str) -> None:
    """Raise UnsupportedMethodError unless the language model has one table of rotary frequencies for all layers."""
    rotary: Any = getattr(family.language_model, "rotary_emb", None)
    if getattr(rotary, "inv_freq", None) is None:
        raise UnsupportedMethodError(
            f"{name!r} with keep_positions=True asks for the rotary positions of the language model, and "
            f"{type(family.language_model).__name__} has no one table of them (`rotary_emb.inv_freq`); allowed: "
            "keep_positions=False."
        )


def mean_coordinates(family: Family, positions: Tensor) -> Tensor:
    """Return the mean rotary cosine and sine of tokens, fp32 `[tokens, 2]`.

    Args:
        family: the adapter of the model.
        positions: position ids `[..., tokens]`, padding in front of a row not counted; M-RoPE has leading axes.
    """
    model: Any = family.language_model
    axes = positions[-3:] if positions.ndim == 2 else positions[None]
    cosines, sines = rotary_tables(axes, model.rotary_emb.inv_freq.to(positions.device))
    return torch.stack([table_means(cosines), table_means(sines)], dim=-1)
