"""Tower signals as a method gets them, and the probabilities that the host's own eager attention computes."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

import vlmprune
from support.tiny_models import FamilyCase, Row
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.families.registry import find_family


@torch.no_grad()
def seen_by_a_method(monkeypatch: Any, case: FamilyCase, rows: Sequence[Row], signals: Sequence[VisionSignal]) -> Any:
    """Return the batch that a method gets which asks for `signals`."""
    from vlmprune.methods.baselines.uniform import Uniform

    seen: list[Any] = []

    def select(self: Any, batch: Any) -> Any:
        seen.append(batch)
        return original(self, batch)

    original = Uniform.select
    with monkeypatch.context() as patch:
        patch.setattr(Uniform, "select", select)
        patch.setattr(Uniform, "vision_signals", lambda self, tower: tuple(signals))
        model = case.build(torch.float32)
        with vlmprune.pruned(model, "uniform", keep=0.5):
            model(**case.inputs(rows))
    assert len(seen) == 1
    return seen[0]


@torch.no_grad()
def host_attention(monkeypatch: Any, case: FamilyCase, rows: Sequence[Row]) -> dict[int, list[tuple[Tensor, ...]]]:
    """Return per tower layer what the host's eager attention gets and computes in each of its calls.

    Each is (probabilities `[batch, heads, queries, keys]`, queries and keys `[batch, heads, tokens, head_dim]`).
    """
    model = case.build(torch.float32)
    family = find_family(model)
    tower = family.vision_tower
    layers = {id(family.vision_attention(layer)): layer for layer in range(family.tower_facts.layers)}
    module: Any = sys.modules[type(family.vision_attention(0)).__module__]
    original, seen = module.eager_attention_forward, {layer: [] for layer in layers.values()}

    def forward(attention: Any, query: Tensor, key: Tensor, *args: Any, **kwargs: Any) -> Any:
        output, weights = original(attention, query, key, *args, **kwargs)
        if id(attention) in layers:
            seen[layers[id(attention)]].append((weights, query, key))
        return output, weights

    before = tower.config._attn_implementation
    with monkeypatch.context() as patch:
        patch.setattr(module, "eager_attention_forward", forward)
        tower.set_attn_implementation("eager")
        try:
            model(**case.inputs(rows))
        finally:
            tower.set_attn_implementation(before)
    return seen
