"""Whether scores of a class's tower stand at the visual tokens that are made of the patches scored."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

import vlmprune
from support.general.host_case import HostCase
from vlmprune.methods.baselines.uniform import Uniform
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.families.registry import find_family

KEYS = VisionSignal("keys", 0)


class Looking(Uniform):
    """Evenly spaced tokens, keys of the tower's first layer looked at."""

    def vision_signals(self, tower: Any) -> tuple[VisionSignal, ...]:
        """Ask for the keys."""
        return (KEYS,)

    def select(self, batch: Any) -> Any:
        """Keep what was seen."""
        _SEEN.append((batch.features.clone(), batch.vision[KEYS].clone()))
        return super().select(batch)


_SEEN: list[tuple[Tensor, Tensor]] = []


@torch.no_grad()
def check_tower_order(case: HostCase, rows: list[list[int | str]]) -> None:
    """Change single patches where the tower's first layer begins, with its attention silenced, and see which tokens change.

    Raises:
        AssertionError: scores change at other visual tokens than features do.
    """
    family = find_family(case.model)
    layers = family.tower_facts.layers
    before, hidden = _run(case, rows, layers, None)
    keys_before, tokens = _SEEN[-1][1], hidden.shape[-2]
    for place in {1, tokens // 2 + 1, tokens - 1}:
        features, _ = _run(case, rows, layers, place)
        changed = ((features - before).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
        scored = ((_SEEN[-1][1] - keys_before).abs().amax(-1) > 1e-6).nonzero().flatten().tolist()
        assert changed, f"patch {place} makes no visual token"
        assert changed == scored, f"patch {place} makes visual tokens {changed}, its keys are those of {scored}"
    _SEEN.clear()


def _run(case: HostCase, rows: Any, layers: int, place: int | None) -> tuple[Tensor, Tensor]:
    family = find_family(case.model)
    hiddens: list[Tensor] = []

    def change(module: Any, args: Any, kwargs: dict[str, Any]) -> Any:
        hidden = (args[0] if args else kwargs["hidden_states"]).clone()
        hiddens.append(hidden)
        if place is not None:
            hidden[..., place, :] += torch.linspace(-1, 1, hidden.shape[-1])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def silence(module: Any, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    handles = [family.vision_layer(0).register_forward_pre_hook(change, with_kwargs=True)]
    handles += [family.vision_attention(layer).register_forward_hook(silence) for layer in range(layers)]
    try:
        with vlmprune.pruned(case.model, Looking(keep=0.5)):
            case.model(**case.inputs(rows))
    finally:
        for handle in handles:
            handle.remove()
    return _SEEN[-1][0], hiddens[0]
