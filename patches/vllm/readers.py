"""Attention of vision towers as vLLM builds them: queries and keys are read where they enter vLLM's attention module."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmprune.errors import LayoutError

from ..calls import TowerCall
from ..hooks import HookSet
from ..tower.dense import DenseTowerReader, QueryRows
from ..tower.packed import PackedAttention, PackedTowerReader, WindowedTowerReader, window_order

if TYPE_CHECKING:
    from ..families.family import Family


class DenseReader(DenseTowerReader):
    """Towers over tiles: `attn(query, key, value)` of `[tiles, tokens, heads * head_dim]`."""

    def watch_attention(self, family: Family, layer: int, queries: QueryRows, hooks: HookSet) -> None:
        """Register the hook before vLLM's attention module."""
        inner = hooks.child(family.vision_attention(layer), "attn")
        hooks.before(f"vision layer {layer} attention", inner, partial(self._keep_attention, layer))

    def _keep_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            query, key = _query_and_key(args, kwargs)
            captured = self.calls.tower[-1].captured
            captured["q_proj", layer], captured["k_proj", layer] = query, key


class PackedReader(PackedTowerReader):
    """Packed towers: `attn(query, key, value, cu_seqlens)` of `[1, patches, heads, head_dim]`, rotary positions applied."""

    def watch_attention(self, layer: int, attention: nn.Module, hooks: HookSet) -> None:
        """Register the hook before vLLM's attention module."""
        inner = hooks.child(attention, "attn")
        hooks.before(f"vision layer {layer} attention", inner, partial(self._keep_attention, layer))

    def packed_attention(self, layer: int, call: TowerCall) -> PackedAttention:
        """Return what the attention of one layer was computed from."""
        query, key, bounds = call.captured["attention", layer]
        return PackedAttention(query[0], key[0], bounds, None, query.shape[-1] ** -0.5)

    def _keep_attention(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if not self.calls.tower:
            return
        query, key = _query_and_key(args, kwargs)
        bounds: Tensor = kwargs["cu_seqlens"]
        if int(bounds[-1]) != query.shape[1]:
            raise LayoutError(
                f"The attention of vision layer {layer} got bounds up to {int(bounds[-1])} for {query.shape[1]} patches: this "
                "attention backend counts otherwise. Choose another with --mm-encoder-attn-backend."
            )
        self.calls.tower[-1].captured["attention", layer] = query.detach(), key.detach(), bounds


class WindowedReader(PackedReader, WindowedTowerReader):
    """The same for a tower that sorts its patches by window."""

    def _keep_order(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            grid = torch.as_tensor(kwargs["grid_thw"] if "grid_thw" in kwargs else args[1])
            self.calls.tower[-1].captured["window_index", 0] = window_order(module, (), {"grid_thw": grid})


def _query_and_key(args: Any, kwargs: dict[str, Any]) -> tuple[Tensor, Tensor]:
    given = dict(zip(("query", "key"), args, strict=False)) | kwargs
    return given["query"], given["key"]
