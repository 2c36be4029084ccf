"""Attention of towers that encode equally large tiles and project queries and keys apart (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedMethodError
from vlmprune.kernels.received_attention import received_attention
from vlmprune.kernels.row_attention import row_attention
from vlmprune.kernels.unmerge import unmerge
from vlmprune.methods.batch import ALL_QUERIES_KINDS, ATTENTION_KINDS, VisionSignal

from ..calls import CallStack, TowerCall
from ..hooks import HookSet
from .reader import TowerReader

if TYPE_CHECKING:
    from ..families.family import Family


QueryRows = Literal["all", "first", "none"]


class DenseTowerReader(TowerReader):
    """Reads `q_proj` and `k_proj`; for CLS attention a single query row per tile is kept and multiplied with the keys."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 1
        self.state_layers: tuple[int, ...] = ()

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register hooks on the projections of every layer, and on what gives the features."""
        super().install(family, signals, calls, hooks)
        self.heads = family.vision_heads
        whole_queries = {signal.layer for signal in signals if signal.kind in ALL_QUERIES_KINDS}
        queries = {signal.layer for signal in signals if signal.kind in ATTENTION_KINDS}
        keys = queries | {signal.layer for signal in signals if signal.kind == "keys"}
        for layer in sorted(keys):
            rows: QueryRows = "all" if layer in whole_queries else "first" if layer in queries else "none"
            self.watch_attention(family, layer, rows, hooks)
        outputs = {signal.layer for signal in signals if signal.kind == "states"}
        if any(signal.kind == "cls_features" for signal in signals):
            self.state_layers = family.state_layers
            if min(self.state_layers) < 0:
                raise UnsupportedMethodError(
                    "The visual tokens are made from the tower's embeddings; features of the CLS token are read behind a layer."
                )
            outputs |= set(self.state_layers)
        for layer in sorted(outputs):
            hooks.after(f"vision layer {layer} output", family.vision_layer(layer), partial(self._keep_state, layer))

    def watch_attention(self, family: Family, layer: int, queries: QueryRows, hooks: HookSet) -> None:
        """Register the hooks that keep the keys of one layer, and those queries that are asked for."""
        attention = family.vision_attention(layer)
        for kind, child in zip(("q_proj", "k_proj"), family.vision_projections, strict=True):
            if kind == "k_proj" or queries != "none":
                hook = partial(self._keep_projection, kind, layer, kind == "k_proj" or queries == "all")
                hooks.after(f"vision layer {layer} {child}", hooks.child(attention, child), hook)

    def read(self, signal: VisionSignal, call: TowerCall) -> Tensor:
        """Return `[tiles, tokens, channels]`, with the CLS column where there is one; of "cls_features" `[tiles, channels]`."""
        captured = call.captured
        if signal.kind == "features":
            return captured["projector input", 0].detach().float()
        if signal.kind == "cls_features":
            return torch.cat([captured["state", layer].detach()[:, 0].float() for layer in self.state_layers], dim=-1)
        if signal.kind == "states":
            return captured["state", signal.layer].detach().float()
        key = captured["k_proj", signal.layer].detach()
        query = None if signal.kind == "keys" else captured["q_proj", signal.layer].detach()
        groups: Tensor | None = captured.get(("groups", signal.layer))
        if groups is None:
            return self._scores(signal, query, key)
        if call.reduction is not None and call.reduction.method.drops:
            scores = self._scores(signal, query, key, captured.get(("valid", signal.layer)))
            spread = unmerge(scores, groups)
            if signal.kind != "cls_logits":
                return spread
            return torch.where(groups[..., None] < 0, scores.amin(1, keepdim=True), spread)
        # As many keys as a token stands for, so that each of them gets its share of the token's attention.
        if signal.kind in ALL_QUERIES_KINDS:
            assert query is not None
            query = unmerge(query, groups)
        return self._scores(signal, query, unmerge(key, groups))

    def _scores(self, signal: VisionSignal, query: Tensor | None, key: Tensor, valid: Tensor | None = None) -> Tensor:
        if query is None:
            return key.float()
        heads = 1 if signal.kind == "cls_attention_one_head" else self.heads
        query, key = query.unflatten(-1, (heads, -1)), key.unflatten(-1, (heads, -1))
        if signal.kind == "received_attention":
            tiles, tokens = key.shape[:2]
            boundaries = torch.arange(tiles + 1, device=key.device, dtype=torch.int32) * tokens
            received = received_attention(query.flatten(0, 1), key.flatten(0, 1), boundaries, reduce_heads="none")
            return received.unflatten(0, (tiles, tokens))
        if signal.kind == "mean_query_attention":
            query = query.float().mean(1, keepdim=True)
        rows = row_attention(query[:, :1], key, mask=valid, logits=signal.kind == "cls_logits")
        return rows[:, 0].transpose(1, 2)

    def _keep_state(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.calls.tower:
            state = output[0] if isinstance(output, tuple) else output
            self.calls.tower[-1].captured["state", layer] = state

    def _keep_projection(
        self, kind: str, layer: int, whole: bool, module: nn.Module, args: Any, kwargs: Any, output: Tensor
    ) -> None:
        if self.calls.tower:
            call = self.calls.tower[-1]
            call.captured[kind, layer] = output if whole else output[:, :1]
            if kind == "k_proj" and call.reduction is not None:
                call.captured["groups", layer] = call.reduction.tokens.groups[:, : call.reduction.tokens.tokens]
                call.captured["valid", layer] = call.reduction.valid
