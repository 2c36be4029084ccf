"""Calls that go on with a cache whose layers hold different tokens: mask and positions of each group of layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from ..cache.state import LayerGroup, PrunedCacheState
from ..calls import LanguageModelCall
from ..families.family import Family
from ..prefill.sequence_bounds import SEQUENCE_BOUNDS


class ContinuedLayers:
    """What the layers are given in one such call, where nothing is dropped any more.

    The host makes the mask of the first group, and the rotary embeddings of all groups whose positions differ in its one call
    for them: `enter_rotary` adds their positions as rows, `leave_rotary` takes their embeddings away again.

    Args:
        call: the call in the caller's columns; it brings no images.
        state: what the cache knows of itself; at least two layer groups.
        family: the model's adapter.
        gapless: whether position ids count without gaps, so that the attention function may see them.
        together: whether the positions of several groups can be rotated in one call.
    """

    def __init__(
        self, call: LanguageModelCall, state: PrunedCacheState, family: Family, gapless: bool, together: bool
    ) -> None:
        self.call = call
        self.family = family
        self.gapless = gapless
        self.groups = state.later_groups
        self.shifts = state.shifts
        self.together = together and self.shifts.differing > 1
        self.embeddings: list[Any] = []
        self.inputs: dict[str, Any] | None = None

    def enter_rotary(self, positions: Tensor) -> Tensor | None:
        """Return all positions `[..., differing * batch, columns]`, or None where there are no others.

        Args:
            positions: those of the first group as the host passes them, `[..., batch, columns]`.
        """
        if not self.together or self.embeddings:
            return None
        rows = positions if positions.shape[-2] == 1 else torch.cat([positions] * self.shifts.differing, dim=-2)
        return rows + self.shifts.added

    def leave_rotary(self, embeddings: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        """Keep what the host made of these positions, `[..., differing * batch, columns, dim]`, and return the first group's."""
        if not self.together or self.embeddings:
            return None
        self.embeddings = [*zip(*(part.chunk(self.shifts.differing, dim=-3) for part in embeddings), strict=True)]
        first: tuple[Tensor, ...] = self.embeddings[0]
        return first

    def enter(self, layer: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any] | None:
        """Return the keyword arguments of `layer`, or None where those of the host are right.

        Args:
            layer: the layer that begins.
            args: its arguments as the host passes them.
            kwargs: likewise.
        """
        group = self.groups.get(layer)
        if group is not None:
            self.inputs = self._inputs(group, args[0] if args else kwargs["hidden_states"], kwargs)
        return None if self.inputs is None else {**kwargs, **self.inputs}

    def _inputs(self, group: LayerGroup, hidden: Tensor, kwargs: dict[str, Any]) -> dict[str, Any]:
        positions, number = self.call.positions, self.shifts.numbers[group.first_layer]
        inputs: dict[str, Any] = {name: None for name in SEQUENCE_BOUNDS if name in kwargs}
        # Flash attention reads gaps as packed sequences, so only gapless positions go to the attention function, and none of
        # a single token.
        several = self.gapless and positions.ndim == 2 and positions.shape[-1] > 1
        inputs["position_ids"] = positions - group.removed if several else None
        if number and self.embeddings:
            inputs["position_embeddings"] = self.embeddings[number]
        elif number:
            self.together = False
            rotary: Any = self.family.language_model.rotary_emb
            inputs["position_embeddings"] = rotary(hidden, rotary_positions(self.family, positions - group.removed))
        inputs["attention_mask"] = self._mask(group, hidden, kwargs)
        return inputs

    def _mask(self, group: LayerGroup, hidden: Tensor, kwargs: dict[str, Any]) -> Any:
        valid = group.extended(*self.call.later_tokens)
        if valid is None and kwargs.get("attention_mask") is None and hidden.shape[1] == 1:
            # What the host found for the layers before, where nothing was masked either or the backend takes no mask.
            return None
        model: Any = self.family.language_model
        return create_causal_mask(
            config=model.config,
            inputs_embeds=hidden,
            attention_mask=valid,
            past_key_values=kwargs.get("past_key_values"),
            layer_idx=group.first_layer,
            allow_is_causal_skip=valid is None,
        )


def rotary_positions(family: Family, positions: Tensor) -> Tensor:
    """Return position ids `[..., batch, columns]` as the family's rotary embedding takes them."""
    if not family.mrope:
        return positions
    if positions.ndim == 2:
        return positions[None].expand(3, -1, -1)
    return positions[1:] if positions.shape[0] == 4 else positions


def follows_length(rotary: Any) -> bool:
    """Return whether frequencies depend on the highest position of a call, so that sequences of other lengths cannot share it."""
    kind = str(getattr(rotary, "rope_type", "default"))
    return "dynamic" in kind or "longrope" in kind
