"""Calls that go on with a cache whose layers hold different tokens: mask and positions of each group of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ..cache.state import PrunedCacheState
from ..calls import LanguageModelCall
from ..families.family import Family
from ..prefill.sequence_bounds import SEQUENCE_BOUNDS


class ContinuedLayers:
    """What the layers are given in one such call, where nothing is dropped any more.

    The host makes mask and rotary embeddings for the first group. Those of the others are made once, at the first layer that
    needs them, and rotary embeddings only for positions that differ.

    Args:
        call: the call in the caller's columns; it brings no images.
        state: what the cache knows of itself; at least two layer groups.
        family: the model's adapter.
        gapless: whether position ids count without gaps, so that the attention function may see them.
    """

    def __init__(self, call: LanguageModelCall, state: PrunedCacheState, family: Family, gapless: bool) -> None:
        self.call = call
        self.state = state
        self.family = family
        self.gapless = gapless
        self.later, self.count = state.later_tokens(call.cache, call.mask, call.columns)
        self.boundaries = {group.first_layer for group in state.layer_groups[1:]}
        self.groups: dict[int, dict[str, Any]] = {}
        self.inputs: dict[str, Any] | None = None

    def enter(self, layer: int, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the arguments of `layer`, or None where those of the host are right.

        Args:
            layer: the layer that begins.
            hidden: the states that enter it, `[batch, columns, dim]`.
            kwargs: its other arguments as the host passes them.
        """
        if layer in self.boundaries:
            if not self.groups:
                self.groups = self._make(hidden, kwargs)
            self.inputs = self.groups[layer]
        return None if self.inputs is None else {**kwargs, **self.inputs}

    def _make(self, hidden: Tensor, kwargs: dict[str, Any]) -> dict[int, dict[str, Any]]:
        positions, embeddings = self._positions(hidden)
        bounds = {name: None for name in SEQUENCE_BOUNDS if name in kwargs}
        made = {}
        for number, group in enumerate(self.state.layer_groups[1:], 1):
            made[group.first_layer] = {
                "attention_mask": self._mask(number, hidden, kwargs),
                # Flash attention reads gaps as packed sequences, so only gapless positions go to the attention function.
                "position_ids": positions[number] if positions[number].ndim == 2 and self.gapless else None,
                **bounds,
            }
            if embeddings[number] is not None:
                made[group.first_layer]["position_embeddings"] = embeddings[number]
        return made

    def _mask(self, number: int, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        group, cache = self.state.layer_groups[number], kwargs.get("past_key_values")
        valid = group.extended(self.later, self.count)
        if valid is None and kwargs.get("attention_mask") is None and self.call.columns == 1:
            # What the host found for the first group, where nothing is masked either.
            return None
        model: Any = self.family.language_model
        return create_causal_mask(
            config=model.config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=cache,
            layer_idx=group.first_layer,
            allow_is_causal_skip=valid is None,
        )

    def _positions(self, hidden: Tensor) -> tuple[list[Tensor], list[Any]]:
        """Return positions `[..., batch, columns]` of each group, and rotary embeddings, None where the host's are right."""
        rotary: Any = self.family.language_model.rotary_emb
        numbers, removed = self.state.shifts
        shifted = self.call.positions.unsqueeze(-3) - removed
        positions = list(shifted.unbind(-3))
        embeddings: list[Any] = [None]
        if len(positions) > 1:
            rotated = [rotary_positions(self.family, each) for each in positions[1:]]
            if _follows_length(rotary):
                embeddings += [rotary(hidden, each) for each in rotated]
            else:
                together = rotary(hidden, torch.cat(rotated, dim=-2))
                embeddings += zip(*(part.chunk(len(rotated), dim=-3) for part in together), strict=True)
        return [positions[number] for number in numbers], [embeddings[number] for number in numbers]


def rotary_positions(family: Family, positions: Tensor) -> Tensor:
    """Return position ids `[..., batch, columns]` as the family's rotary embedding takes them."""
    if not family.mrope:
        return positions
    if positions.ndim == 2:
        return positions[None].expand(3, -1, -1)
    return positions[1:] if positions.shape[0] == 4 else positions


def _follows_length(rotary: Any) -> bool:
    """Whether frequencies depend on the highest position of a call, so that sequences of several lengths cannot share it."""
    kind = str(getattr(rotary, "rope_type", "default"))
    return "dynamic" in kind or "longrope" in kind
