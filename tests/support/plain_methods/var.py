"""VAR on whole attention maps: what the official code does with eager attention, for one row."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor

from support.host_parts import decoder


def plain_sinks(hidden: Tensor, dimensions: list[int], tau: float) -> list[int]:
    """Return the sinks among `hidden [tokens, dim]`."""
    found = []
    for token, state in enumerate(hidden.double()):
        rms = float((state.square().mean() + 1e-6) ** 0.5)
        if max(abs(float(state[channel])) / rms for channel in dimensions) > tau:
            found.append(token)
    return found


@contextmanager
def plain_var(
    model: Any, visual: Tensor, prompt: int, *, tau: float, moved: float, share: float, weight: float, first_layer: int
) -> Iterator[dict[str, int]]:
    """Let an unpatched model attend as VAR says, without cache or padding, one row at a time.

    Args:
        model: the whole model.
        visual: bool `[tokens]`, visual tokens of the row.
        prompt: how many tokens are the prompt's.
        tau: threshold of a sink.
        moved: share of a sink's weight that moves.
        share: highest share of sinks.
        weight: lowest weight of visual tokens.
        first_layer: the first layer that changes.
    """
    counts = {"rows": 0, "sinks": 0}
    entering: dict[str, Any] = {}
    begin = int(visual.nonzero()[0])

    def attend(attention: Any, hidden_states: Tensor, position_embeddings: Any, **kwargs: Any) -> tuple[Tensor, None]:
        function = getattr(sys.modules[type(attention).__module__], "apply_rotary_pos_emb", None)
        heads = [
            projection(hidden_states).unflatten(-1, (-1, attention.head_dim))
            for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
        ]
        for place, norm in enumerate(("q_norm", "k_norm")):
            if hasattr(attention, norm):
                heads[place] = getattr(attention, norm)(heads[place])
        query, key, value = (states.transpose(1, 2) for states in heads)
        query, key = function(query, key, *position_embeddings)
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, dim=1), value.repeat_interleave(groups, dim=1)
        length = query.shape[2]
        logits = query @ key.transpose(2, 3) * attention.scaling
        maps = logits.masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf).softmax(-1)
        sinks = plain_sinks(entering["hidden"][0, :prompt], entering["dimensions"], tau)
        images = visual.nonzero().flatten().tolist()
        both, rest = [k for k in images if k in sinks], [k for k in images if k not in sinks]
        counts["sinks"] += len(both)
        for head in range(maps.shape[1]):
            for row in range(begin, length):
                if (row < len(visual) and visual[row]) or not both or not rest:
                    continue
                weights = maps[0, head, row].clone()
                seen = float(weights[images].sum())
                part = float((weights[both] + 1e-6).sum() / (weights[images] + 1e-6).sum())
                if seen < weight or part > share:
                    continue
                counts["rows"] += 1
                freed = moved * weights[sinks].sum()
                new = weights.clone()
                new[sinks] = (1 - moved) * weights[sinks]
                new[rest] = weights[rest] + freed * weights[rest] / weights[rest].sum()
                maps[0, head, row] = new
        return attention.o_proj((maps @ value).transpose(1, 2).flatten(2)), None

    def enter(number: int, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden = args[0] if args else kwargs["hidden_states"]
        entering["hidden"] = hidden
        if number == first_layer:
            first = hidden[0, 0].double()
            high = (first.abs() / (first.square().mean() + 1e-6) ** 0.5 > tau).nonzero().flatten().tolist()
            entering["dimensions"] = high or list(range(len(first)))

    layers = decoder(model).layers
    handles = [
        layer.register_forward_pre_hook(partial(enter, number), with_kwargs=True)
        for number, layer in enumerate(layers)
        if number >= first_layer
    ]
    for layer in layers[first_layer:]:
        layer.self_attn.forward = partial(attend, layer.self_attn)
    try:
        yield counts
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers[first_layer:]:
            del layer.self_attn.forward
