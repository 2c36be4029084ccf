"""Prompts for tiny Gemma models: images between their markers, and the types of all tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.tiny_models import IMAGE_TOKEN, VOCABULARY, FamilyCase, Row

BEGIN, END = 117, 116
TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 512,
    # Shorter than an image with its text, so that windows slide.
    "sliding_window": 16,
    # With this a norm of nearly nothing does not blow up rounding.
    "rms_norm_eps": 0.1,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
}


@dataclass(frozen=True, repr=False)
class GemmaCase(FamilyCase):
    """A tiny Gemma model.

    Attributes:
        types: the name of the argument that tells image tokens.
    """

    types: str = "token_type_ids"

    def inputs(
        self, rows: Sequence[Row], padding: str = "left", dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the model inputs of a padded batch."""
        inputs = super().inputs(rows, padding, dtype)
        return {**inputs, self.types: (inputs["input_ids"] == IMAGE_TOKEN).long()}

    def longer(self, model: Any, turns: Sequence[dict[str, Tensor]], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return `generate` inputs for `ids` and `mask`, with the types of all tokens."""
        return {**super().longer(model, turns, ids, mask), self.types: (ids == IMAGE_TOKEN).long()}

    def _ids(self, row: Row) -> list[int]:
        marked: list[int | str] = []
        for item in row:
            marked += [-BEGIN, item, -END] if isinstance(item, str) else [item]
        ids: list[int] = []
        for item in marked:
            if isinstance(item, str):
                ids += [IMAGE_TOKEN] * self.tokens(item)
            elif item < 0:
                ids.append(-item)
            else:
                generator = torch.Generator().manual_seed(1000 + 31 * len(ids) + item)
                ids += torch.randint(1, IMAGE_TOKEN - 10, (item,), generator=generator).tolist()
        return ids
