"""Cases of Recoverable Compression: one tile, by features, queries and keys, and the similarity to the text."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import CLIP, make_batch, square_layout
from official_cases.input_site import Tensors
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.batch import Instruction, VisualBatch
from vlmprune.methods.input.recoverable_compression import RecoverableCompression
from vlmprune.methods.input.recoverable_compression_tile import choose_in_tile


class GivenSimilarity(RecoverableCompression):
    """The method with the similarity of a case."""

    similarity: Tensor

    def _similarity(self, batch: VisualBatch, instruction: Instruction, tokens: Tensor) -> Tensor:
        return self.similarity


def recoverable_compression(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """What is kept for which reason, and the tokens in the official order."""
    features, (query, key) = inputs["features"][0], (inputs[name][:, :, None] for name in "qk")
    attention = row_attention(query[:, :1], key)[0, 0, :, 1:].T
    method = GivenSimilarity(relevance="instruction", order="official")
    similarity = inputs["similarity"].flatten()
    object.__setattr__(method, "similarity", similarity)
    keys = inputs["k"][0, 1:]
    vision = dict(zip(method.vision_signals(CLIP), (attention, keys, features), strict=True))
    batch = make_batch(
        method,
        [square_layout(len(features))],
        features=features,
        vision=vision,
        project=lambda rows: rows,
        instructions=(Instruction(None, *[torch.ones(1, features.shape[1])] * 2),),
    )
    chosen = choose_in_tile(attention[:, 0], keys, similarity, features.shape[1], None, code=True)
    selection = method.select(batch)
    assert selection.features is not None
    return {
        "cls_attn": attention.T,
        "idx_vision": chosen.by_attention[None],
        "idx_text": chosen.by_text[None],
        "idx_main_sorted": chosen.main[None],
        "centers": chosen.centres[None],
        "out": selection.features[None],
    }


RUNS = {"recoverable_compression": recoverable_compression}
