"""Attention of towers over pictures of any size, row by row, whose patches are merged behind them (Pixtral, PaddleOCR-VL)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmprune.methods.batch import VisionSignal

from ..calls import CallStack, TowerCall
from .packed import PackedAttention, PackedTowerReader

if TYPE_CHECKING:
    from ..families.family import Family
    from ..hooks import HookSet


class RasterTowerReader(PackedTowerReader):
    """Reads `q_proj` and `k_proj`; all patches of a picture, then those of the next.

    Scores are those of the other packed towers: what a patch receives from those of its picture, averaged over the patches of a
    visual token.
    """

    def __init__(self, side: int) -> None:
        super().__init__()
        self.side = side
        self.family: Family | None = None

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register hooks on the tower, on the attention of every layer, and on what the projector gets."""
        self.family = family
        super().install(family, signals, calls, hooks)
        hooks.before("vision grids", family.vision_tower, self._keep_grids)

    def patches_of_a_token(self, family: Family) -> int:
        """Return how many patches become one visual token."""
        return self.side**2

    def watch_attention(self, layer: int, attention: nn.Module, hooks: HookSet) -> None:
        """Register hooks on the two projections of a layer."""
        hooks.before(f"vision layer {layer} positions", attention, partial(self._keep_arguments, layer))
        for kind in ("q_proj", "k_proj"):
            hook = partial(self._keep_projected, kind, layer)
            hooks.after(f"vision layer {layer} {kind}", hooks.child(attention, kind), hook)

    def packed_attention(self, layer: int, call: TowerCall) -> PackedAttention:
        """Return what the attention of one layer was computed from, patches of a visual token together."""
        attention: Any = self.layers[layer]
        cos, sin = call.captured["arguments", layer]["position_embeddings"]
        query, key = (
            call.captured[kind, layer].detach().flatten(0, -2).unflatten(-1, (self.heads, -1))
            for kind in ("q_proj", "k_proj")
        )
        query, key = self.rotated(attention, query, key, cos, sin)
        order = self._order(call, key.device)
        bounds = list(accumulate((rows * columns for rows, columns in call.captured["grids", 0]), initial=0))
        cu_seqlens = torch.tensor(bounds, dtype=torch.int32, device=key.device)
        return PackedAttention(query[order], key[order], cu_seqlens, None, attention.scaling)

    def patch_features(self, call: TowerCall) -> Tensor:
        """Return what the projector gets, `[patches, dim]`, patches of a visual token together."""
        features = call.captured["projector input", 0].detach().flatten(0, -2)
        return features[self._order(call, features.device)]

    def _order(self, call: TowerCall, device: torch.device) -> Tensor:
        """Return the place row by row of each patch, visual token after visual token."""
        parts, start = [], 0
        for rows, columns in call.captured["grids", 0]:
            places = torch.arange(start, start + rows * columns)
            cells = places.view(rows // self.side, self.side, columns // self.side, self.side)
            parts.append(cells.transpose(1, 2).flatten())
            start += rows * columns
        return torch.cat(parts).to(device, non_blocking=True)

    def _keep_grids(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            assert self.family is not None
            self.calls.tower[-1].captured["grids", 0] = self.family.tower_grids(args, kwargs)

    def _keep_projected(self, kind: str, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self.calls.tower:
            self.calls.tower[-1].captured[kind, layer] = output


class UnfoldedTowerReader(RasterTowerReader):
    """The same where a linear layer gets the patches of a visual token channel by channel (Mistral 3)."""

    def patch_features(self, call: TowerCall) -> Tensor:
        """Return what that layer gets, `[patches, dim]`, patches of a visual token together."""
        unfolded = call.captured["projector input", 0].detach()
        return unfolded.unflatten(-1, (-1, self.side**2)).transpose(1, 2).flatten(0, 1)
