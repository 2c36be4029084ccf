"""Attention of single vision tower layers, computed from captured queries and keys."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.kernels.received_attention import received_attention
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.visual_batch import VisionSignal

from .call_frames import FrameStack, ImageSignals, TowerFrame
from .families.family import Family
from .hooks import HookSet

SIGNALS_ATTRIBUTE = "_vlmprune_signals"


class VisionCapture:
    """Hooks that read the projected queries and keys of the layers a method scores by.

    The tower keeps its attention backend; for CLS signals a single query row per tile is kept and multiplied with the keys.
    The result is attached to the tower's output object, because `generate` encodes images outside the model's forward; without
    signals the attachment only marks the output as encoded under the applied method.
    """

    def __init__(self, signals: Sequence[VisionSignal], frames: FrameStack) -> None:
        self.signals = tuple(signals)
        self.frames = frames
        self.heads = 1
        self._whole_queries = {signal.layer for signal in signals if signal.kind == "received_attention"}

    def install(self, family: Family, hooks: HookSet) -> None:
        """Register the hooks on the tower and on the layers that are asked for."""
        if self.signals:
            self.heads = family.vision_heads
        hooks.before("vision tower entry", family.vision_tower, self._enter)
        hooks.after("vision tower cleanup", family.vision_tower, self._leave, always=True)
        for layer in sorted({signal.layer for signal in self.signals}):
            attention = family.vision_attention(layer)
            for kind in ("q_proj", "k_proj"):
                projection = getattr(attention, kind)
                hooks.after(f"vision layer {layer} {kind}", projection, self._projection_hook(kind, layer))

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.frames.tower.append(TowerFrame())

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if not self.frames.tower:
            return
        frame = self.frames.tower.pop()
        if output is None:
            return
        setattr(
            output, SIGNALS_ATTRIBUTE, ImageSignals({signal: self._compute(signal, frame) for signal in self.signals})
        )
        if self.frames.model:
            self.frames.model[-1].image_outputs = output

    def _projection_hook(self, kind: str, layer: int) -> Any:
        whole = kind == "k_proj" or layer in self._whole_queries

        def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
            if self.frames.tower:
                frame = self.frames.tower[-1]
                (frame.keys if kind == "k_proj" else frame.queries)[layer] = output if whole else output[:, :1]

        return keep

    def _compute(self, signal: VisionSignal, frame: TowerFrame) -> Tensor:
        query, key = frame.queries[signal.layer].detach(), frame.keys[signal.layer].detach()
        query, key = (states.unflatten(-1, (self.heads, -1)) for states in (query, key))
        if signal.kind == "received_attention":
            tiles, tokens = key.shape[:2]
            boundaries = torch.arange(tiles + 1, device=key.device, dtype=torch.int32) * tokens
            received = received_attention(query.flatten(0, 1), key.flatten(0, 1), boundaries, reduce_heads="none")
            return received.unflatten(0, (tiles, tokens))
        rows = row_attention(query[:, :1], key, logits=signal.kind == "cls_logits")
        return rows[:, 0].transpose(1, 2)
