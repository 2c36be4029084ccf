"""A vision tower with ToMe in plain loops, one tile at a time, token by token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PlainState:
    """The output of one block.

    Attributes:
        values: `[dim]` per token, CLS token first where there is one.
        members: for each token those of the first block that it stands for.
        places: for each token the one whose place it has.
    """

    values: list[Tensor]
    members: list[list[int]]
    places: list[int]

    def full(self) -> Tensor:
        """Every token of the first block with the value of the one that it went into."""
        found = {member: value for value, members in zip(self.values, self.members, strict=True) for member in members}
        return torch.stack([found[member] for member in sorted(found)])


@torch.no_grad()
def tome_tower(tower: Any, pixels: Tensor, removed: list[int], proportional: bool = True) -> list[PlainState]:
    """Run a CLIP or SigLIP tower on one tile `[1, 3, height, width]`; `removed[block]` tokens go in each block."""
    inner = getattr(tower, "vision_model", tower)
    embedded = inner.embeddings(pixels)
    if hasattr(inner, "pre_layrnorm"):
        embedded = inner.pre_layrnorm(embedded)
    cls = hasattr(inner.embeddings, "class_embedding")
    tokens = list(embedded[0])
    state = PlainState(tokens, [[token] for token in range(len(tokens))], list(range(len(tokens))))
    states = []
    for block, layer in enumerate(inner.encoder.layers):
        stream, keys = _attended(layer, state, proportional)
        state = PlainState(stream, state.members, state.places)
        if block < len(removed) and removed[block]:
            state = _merged(state, keys, removed[block], cls)
        state = PlainState(
            [value + layer.mlp(layer.layer_norm2(value)) for value in state.values], state.members, state.places
        )
        states.append(state)
    return states


def _attended(layer: Any, state: PlainState, proportional: bool) -> tuple[list[Tensor], Tensor]:
    module = layer.self_attn
    normed = layer.layer_norm1(torch.stack(state.values))
    heads = module.num_heads
    query, key, value = (
        projection(normed).unflatten(-1, (heads, -1)) for projection in (module.q_proj, module.k_proj, module.v_proj)
    )
    attended = []
    for head in range(heads):
        logits = query[:, head] @ key[:, head].T * query.shape[-1] ** -0.5
        weights = logits.exp()
        if proportional:
            weights = weights * torch.tensor([float(len(members)) for members in state.members])
        attended.append(weights / weights.sum(1, keepdim=True) @ value[:, head])
    out = module.out_proj(torch.cat(attended, -1))
    return [before + change for before, change in zip(state.values, out, strict=True)], key.mean(1)


def _merged(state: PlainState, keys: Tensor, number: int, cls: bool) -> PlainState:
    count = len(state.values)
    first, second = list(range(0, count, 2)), list(range(1, count, 2))
    best = {}
    for token in first:
        if cls and token == 0:
            continue
        cosines = [float(torch.cosine_similarity(keys[token], keys[other], dim=0)) for other in second]
        best[token] = (max(cosines), second[cosines.index(max(cosines))])
    sources = sorted(best, key=lambda token: (-best[token][0], token))
    leaving, staying = sources[:number], sources[number:]
    unmerged = [0, *sorted(staying)] if cls else staying
    values, members, places = [], [], []
    for token in unmerged + second:
        group = [token, *(source for source in sorted(leaving) if best[source][1] == token)]
        weights = [len(state.members[other]) for other in group]
        total = sum(weight * state.values[other] for weight, other in zip(weights, group, strict=True))
        values.append(total / sum(weights))
        members.append([member for other in group for member in state.members[other]])
        places.append(state.places[token])
    return PlainState(values, members, places)
