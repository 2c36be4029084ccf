"""Attention of towers that encode equally large tiles and project queries and keys apart (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmprune.kernels.received_attention import received_attention
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.batch import VisionSignal

from ..calls import CallStack, TowerCall
from ..hooks import HookSet
from .reader import TowerReader

if TYPE_CHECKING:
    from ..families.family import Family


class DenseTowerReader(TowerReader):
    """Reads `q_proj` and `k_proj`; for CLS signals a single query row per tile is kept and multiplied with the keys."""

    def __init__(self) -> None:
        self.heads = 1
        self.calls = CallStack()

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register hooks on both projections of every layer."""
        self.heads, self.calls = family.vision_heads, calls
        whole_queries = {signal.layer for signal in signals if signal.kind == "received_attention"}
        for layer in sorted({signal.layer for signal in signals}):
            attention = family.vision_attention(layer)
            for kind in ("q_proj", "k_proj"):
                whole = kind == "k_proj" or layer in whole_queries
                hook = partial(self._keep_projection, kind, layer, whole)
                hooks.after(f"vision layer {layer} {kind}", getattr(attention, kind), hook)

    def read(self, signal: VisionSignal, call: TowerCall) -> Tensor:
        """Return `[tiles, tokens, heads]`, with the CLS column where the tower has one."""
        query, key = (
            call.captured[kind, signal.layer].detach().unflatten(-1, (self.heads, -1)) for kind in ("q_proj", "k_proj")
        )
        if signal.kind == "received_attention":
            tiles, tokens = key.shape[:2]
            boundaries = torch.arange(tiles + 1, device=key.device, dtype=torch.int32) * tokens
            received = received_attention(query.flatten(0, 1), key.flatten(0, 1), boundaries, reduce_heads="none")
            return received.unflatten(0, (tiles, tokens))
        rows = row_attention(query[:, :1], key, logits=signal.kind == "cls_logits")
        return rows[:, 0].transpose(1, 2)

    def _keep_projection(
        self, kind: str, layer: int, whole: bool, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        if self.calls.tower:
            self.calls.tower[-1].captured[kind, layer] = output if whole else output[:, :1]
