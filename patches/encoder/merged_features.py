"""The projector on merged tokens: it runs on one row a token, and its output is spread over all placeholders.

The host checks that there are as many features as placeholders, so every placeholder gets the feature of the token that its
patch went into; the language model's entry then keeps one placeholder a token.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.shared.merged_tokens import merge_tokens

from ..calls import CallStack
from ..families.family import Family
from ..hooks import HookSet
from ..tower.tower_tokens import MergedPlaces
from .reduced_tokens import spread
from .run import TowerReduction


class MergedFeatures:
    """The hooks on the projector."""

    def __init__(self, family: Family, calls: CallStack) -> None:
        self.family = family
        self.calls = calls

    def install(self, hooks: HookSet) -> None:
        """Register the hooks."""
        hooks.before("merged projector input", self.family.projector, self._shorten)
        hooks.after("merged projector output", self.family.projector, self._spread, first=True)

    @property
    def _tokens(self) -> tuple[TowerReduction, Tensor, MergedPlaces] | None:
        """The run, where every patch went, and the places of the tokens."""
        run: TowerReduction | None = self.calls.tower[-1].reduction if self.calls.tower else None
        tokens = None if run is None else run.tower_tokens()
        if run is None or tokens is None or tokens.merged is None:
            return None
        assert isinstance(tokens.groups, Tensor)
        return run, tokens.groups, tokens.merged

    def _shorten(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tokens = self._tokens
        if tokens is None:
            return None
        run, groups, merged = tokens
        features: Tensor = args[0] if args else next(iter(kwargs.values()))
        if tuple(features.shape[:2]) != tuple(groups.shape):
            raise UnsupportedCallError(
                f"{run.method.name!r} with output='merged' hands on the patches of a tile, {groups.shape[1]}, and the "
                f"projector was given {list(features.shape[:-1])}; leave vision_feature_select_strategy as it was at apply."
            )
        states, leading, outputs = self.family.state_layers, run.leading, run.plan[-1]
        rows = []
        for state, part in zip(states, features.chunk(len(states), -1), strict=True):
            if state == max(states):
                last = run.read[state][:, leading : leading + outputs]
                rows.append(last.gather(1, merged.order[..., None].expand(-1, -1, last.shape[-1])))
            else:
                # Outputs of earlier blocks are longer.
                rows.append(merge_tokens(part, groups, None, outputs)[0])
        shorter = torch.cat(rows, -1) if len(rows) > 1 else rows[0]
        if args:
            return (shorter, *args[1:]), kwargs
        return args, {**kwargs, next(iter(kwargs)): shorter}

    def _spread(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        tokens = self._tokens
        if tokens is None:
            return None
        _, groups, merged = tokens
        return spread(output, merged.sources(groups))
