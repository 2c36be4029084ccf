"""HAWK in plain loops, from the model's own first layer."""

from __future__ import annotations

from math import sqrt
from typing import Any

import torch
from torch import Tensor

from support.host_parts import decoder


def hawk(model: Any, visual: Tensor, question: Tensor, keep: int, weights: list[float] | None = None) -> list[int]:
    """Return the kept tokens of one image.

    Args:
        model: the whole model.
        visual: `[tokens, dim]`, as they enter the language model.
        question: `[question, dim]`.
        keep: how many stay.
        weights: one a head; None for equal ones.
    """
    layer = decoder(model).layers[0]
    attention, width = layer.self_attn, layer.self_attn.head_dim

    def heads(projection: Any, norm: str, rows: Tensor) -> Tensor:
        states = projection(layer.input_layernorm(rows)).unflatten(-1, (-1, width))
        return getattr(attention, norm)(states) if hasattr(attention, norm) else states

    queries, keys = (
        heads(attention.q_proj, "q_norm", question).double(),
        heads(attention.k_proj, "k_norm", visual).double(),
    )
    count, groups = queries.shape[1], queries.shape[1] // keys.shape[1]
    total = torch.zeros(len(visual), dtype=torch.float64)
    for head in range(count):
        logits = torch.zeros(len(visual), dtype=torch.float64)
        for query in queries[:, head]:
            logits += torch.stack([query @ key for key in keys[:, head // groups]]) / sqrt(width)
        logits /= len(queries)
        total += (1.0 if weights is None else weights[head]) * logits / logits.norm()
    ranked = sorted(range(len(visual)), key=lambda token: -float(total[token]))
    return sorted(ranked[:keep])
