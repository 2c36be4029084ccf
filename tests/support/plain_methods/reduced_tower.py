"""A vision tower whose tokens get fewer, in plain torch, one tile at a time; what a block makes of them is a function."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PlainBlock:
    """One tile at one block.

    Attributes:
        block: its number, and how many there are.
        hidden: `[tokens, dim]`.
        query: `[tokens, heads, head_dim]`, as `key`.
        attention: `[heads, tokens, tokens]`.
        sizes: of each token.
        remove: how many tokens go.
        cls: whether token 0 is the CLS token.
        cross: whether the last one is a copy of it.
    """

    block: int
    blocks: int
    hidden: Tensor
    query: Tensor
    key: Tensor
    attention: Tensor
    sizes: list[float]
    remove: int
    cls: bool
    cross: bool


@dataclass(frozen=True, eq=False)
class PlainReduction:
    """What a method makes of it.

    Attributes:
        values: `[outputs, dim]`.
        back: `[tokens, outputs]`, how much of an output a token is given back.
        places: the token whose place each output has.
        sizes: of each output.
        attention: `[heads, outputs, outputs]`, in place of the block's own.
    """

    values: Tensor
    back: Tensor
    places: list[int]
    sizes: list[float]
    attention: Tensor | None = None


@dataclass(frozen=True, eq=False)
class PlainOutput:
    """The output of a block: `[tokens now, dim]`, the same for all tokens of the first block, and the places of those now."""

    values: Tensor
    full: Tensor
    places: list[int]


def from_groups(hidden: Tensor, groups: Sequence[Sequence[int]], weights: Sequence[float]) -> tuple[Tensor, Tensor]:
    """Return the weighted mean of each group, and what takes it back to its tokens."""
    back = torch.zeros(len(hidden), len(groups))
    values = []
    for output, group in enumerate(groups):
        total = sum(weights[token] for token in group)
        values.append(sum(weights[token] / total * hidden[token] for token in group))
        for token in group:
            back[token, output] = 1.0
    return torch.stack(values), back


@torch.no_grad()
def reduced_tower(
    tower: Any,
    pixels: Tensor,
    removed: Sequence[int],
    reduce: Callable[[PlainBlock], PlainReduction],
    place: str,
    proportional: bool = False,
    cross: bool = False,
) -> list[PlainOutput]:
    """Run a CLIP or SigLIP tower on one tile `[1, 3, height, width]`; `removed[block]` tokens go in each block."""
    inner = getattr(tower, "vision_model", tower)
    embedded = inner.embeddings(pixels)
    if hasattr(inner, "pre_layrnorm"):
        embedded = inner.pre_layrnorm(embedded)
    hidden, cls = embedded[0], hasattr(inner.embeddings, "class_embedding")
    count, cross = len(hidden), cross and cls
    if cross:
        hidden = torch.cat([hidden, hidden[:1]])
    places, sizes = list(range(len(hidden))), [1.0] * len(hidden)
    undo: list[tuple[Tensor, Tensor]] = []
    outputs = []

    def reduced(hidden: Tensor, query: Tensor, key: Tensor, attention: Tensor) -> tuple[Tensor, Tensor | None]:
        nonlocal places, sizes
        reduction = reduce(
            PlainBlock(
                block, len(inner.encoder.layers), hidden, query, key, attention, sizes, removed[block], cls, cross
            )
        )
        assert len(reduction.values) == len(hidden) - removed[block]
        places, sizes = [places[token] for token in reduction.places], reduction.sizes
        undo.append((reduction.back, hidden))
        return reduction.values, reduction.attention

    for block, layer in enumerate(inner.encoder.layers):
        goes = block < len(removed) and removed[block] > 0
        given = None
        if goes and place == "before attention":
            hidden, given = reduced(hidden, *_attention(layer, hidden, sizes if proportional else None)[:3])
        query, key, attention, value = _attention(layer, hidden, sizes if proportional else None)
        used = attention if given is None else given
        mixed = torch.einsum("hqk,khd->qhd", used, value).flatten(1)
        hidden = hidden + layer.self_attn.out_proj(mixed)
        if goes and place == "after attention":
            hidden, _ = reduced(hidden, query, key, attention)
        hidden = hidden + layer.mlp(layer.layer_norm2(hidden))
        if goes and place == "after block":
            hidden, _ = reduced(hidden, query, key, attention)
        full = hidden
        for back, before in reversed(undo):
            dropped = back.sum(1, keepdim=True) == 0
            full = torch.where(dropped, before, back @ full)
        kept = len(hidden) - cross
        outputs.append(PlainOutput(hidden[:kept], full[:count], places[:kept]))
    return outputs


def _attention(layer: Any, hidden: Tensor, sizes: list[float] | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    module, normed = layer.self_attn, layer.layer_norm1(hidden)
    query, key, value = (
        projection(normed).unflatten(-1, (module.num_heads, -1))
        for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    weights = (torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5).exp()
    if sizes is not None:
        weights = weights * torch.tensor(sizes)
    return query, key, weights / weights.sum(-1, keepdim=True), value
