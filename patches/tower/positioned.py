"""Attention of towers over padded pictures whose patches carry their places, averaged in cells at the end (Gemma 4)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedMethodError
from vlmprune.kernels.received_attention import received_attention
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.batch import CLS_KINDS, VisionSignal

from ..calls import CallStack, TowerCall
from .reader import TowerReader

if TYPE_CHECKING:
    from ..families.family import Family
    from ..hooks import HookSet


class PositionedTowerReader(TowerReader):
    """Reads `q_proj` and `k_proj`, norms and rotary positions of a layer, of the patches that are no padding.

    A patch scores by the attention that it receives of all patches of its picture; the patches of a cell are averaged, as
    the tower averages their features.

    Args:
        cell: patches along the side of a cell.
    """

    def __init__(self, cell: int) -> None:
        super().__init__()
        self.cell = cell
        self.layers: dict[int, nn.Module] = {}

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register hooks on the tower, and on projections and attention of every layer.

        Raises:
            UnsupportedMethodError: a signal needs a CLS token, or the attention has no rotary function.
        """
        super().install(family, signals, calls, hooks)
        tower: Any = family.vision_tower
        for signal in signals:
            if signal.kind in CLS_KINDS or signal.kind == "states":
                raise UnsupportedMethodError(
                    f"{type(tower).__name__} has no CLS token, so there is no {signal.kind!r}; allowed: "
                    "'received_attention', 'mean_query_attention', 'keys', 'features'."
                )
            if signal.kind != "features":
                self.layers[signal.layer] = family.vision_attention(signal.layer)
        hooks.before("vision places", tower, self._keep_places)
        for layer, attention in sorted(self.layers.items()):
            if _rotary_function(attention) is None:
                raise UnsupportedMethodError(
                    f"The module of {type(attention).__name__} has no `apply_multidimensional_rope`, so it cannot be read."
                )
            hooks.before(f"vision layer {layer} rotary", attention, partial(self._keep_arguments, layer))
            for kind in ("q_proj", "k_proj"):
                projection = hooks.child(attention, kind)
                hooks.after(f"vision layer {layer} {kind}", projection, partial(self._keep_projection, kind, layer))

    def read(self, signal: VisionSignal, call: TowerCall) -> Tensor:
        """Return `[visual tokens, channels]`, raster order in each picture, pictures one after the other."""
        if signal.kind == "features":
            return call.captured["projector input", 0].detach().float()
        attention: Any = self.layers[signal.layer]
        places: Tensor = call.captured["places", 0]
        valid = (places != -1).all(-1)
        counts = valid.sum(1)
        query, key = (self._rotated(call, kind, signal.layer, attention)[valid] for kind in ("q", "k"))
        repeats = query.shape[1] // key.shape[1]
        if signal.kind == "keys":
            return self._cells(key.float().flatten(1), places, valid)
        key = key.repeat_interleave(repeats, 1)
        if signal.kind == "mean_query_attention":
            given = [
                row_attention(own.float().mean(0)[None, None], keys[None].float(), scale=attention.scaling)[0, 0].T
                for own, keys in zip(query.split(counts.tolist()), key.split(counts.tolist()), strict=True)
            ]
            return self._cells(torch.cat(given), places, valid)
        bounds = torch.nn.functional.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        received = received_attention(query, key, bounds, scale=attention.scaling, reduce_heads="none")
        return self._cells(received, places, valid)

    @torch.no_grad()
    def _rotated(self, call: TowerCall, kind: str, layer: int, attention: Any) -> Tensor:
        """Return queries or keys `[pictures, patches, heads, head_dim]` as the layer attends with them."""
        states = call.captured[f"{kind}_proj", layer].detach().unflatten(-1, (-1, attention.head_dim))
        normed = getattr(attention, f"{kind}_norm").forward(states)
        cos, sin = call.captured["rotary", layer]
        rotated: Tensor = _rotary_function(attention)(normed, cos, sin, call.captured["places", 0])  # type: ignore[misc]
        return rotated

    def _cells(self, values: Tensor, places: Tensor, valid: Tensor) -> Tensor:
        """Average `values [patches that are no padding, channels]` over cells, in raster order of each picture."""
        cells = places.div(self.cell, rounding_mode="floor")
        across = (places[..., 0].amax(1, keepdim=True) + 1).div(self.cell, rounding_mode="floor")
        sizes = valid.sum(1) // self.cell**2
        first = torch.nn.functional.pad(sizes.cumsum(0), (1, 0))[:-1, None]
        number = (first + cells[..., 1] * across + cells[..., 0])[valid].to(values.device)
        means = values.new_zeros(int(sizes.sum()), values.shape[1]).index_add_(0, number, values)
        return means / self.cell**2

    def _keep_places(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            places = kwargs["pixel_position_ids"] if "pixel_position_ids" in kwargs else args[1]
            self.calls.tower[-1].captured["places", 0] = places

    def _keep_arguments(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            self.calls.tower[-1].captured["rotary", layer] = kwargs["position_embeddings"]

    def _keep_projection(
        self, kind: str, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        if self.calls.tower:
            self.calls.tower[-1].captured[kind, layer] = output


def _rotary_function(attention: nn.Module) -> Callable[..., Tensor] | None:
    for cls in type(attention).__mro__:
        function = getattr(sys.modules.get(cls.__module__), "apply_multidimensional_rope", None)
        if function is not None:
            return function
    return None
