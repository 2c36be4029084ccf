"""What belongs to one running call of a patched model, kept per thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from vlmprune.methods.visual_batch import VisionSignal


@dataclass(eq=False)
class TowerFrame:
    """Queries and keys captured during one run of the vision tower.

    Attributes:
        queries: per layer the projected queries that are needed, `[tiles, rows, heads * head_dim]`.
        keys: per layer all projected keys, `[tiles, tokens, heads * head_dim]`.
    """

    queries: dict[int, Tensor] = field(default_factory=dict)
    keys: dict[int, Tensor] = field(default_factory=dict)


@dataclass(eq=False)
class ModelFrame:
    """One running forward of the multimodal model.

    Attributes:
        inputs: the arguments of the call by name.
        visual_mask: bool `[batch, tokens]` on the CPU, true at the placeholders of visual tokens; None where there are none.
        attention_mask: the caller's 2-D mask as bool on the CPU, or None.
        image_outputs: what the vision tower returned, with the projected features per image in `pooler_output`.
        compaction: set by the engine between the language model's entry and its exit.
        record: what the prefill kept before the first layer.
        layer_run: the running sequence where it differs from layer to layer, else None.
    """

    inputs: Mapping[str, Any]
    visual_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    image_outputs: Any = None
    compaction: Any = None
    layer_run: Any = None
    record: Any = None


@dataclass(eq=False)
class ImageSignals:
    """Vision attention that travels with the vision tower's output, also when `generate` encodes images beforehand.

    Attributes:
        vision: per requested signal an fp32 tensor `[tiles, tokens, heads]`, CLS column included where the tower has one.
    """

    vision: dict[VisionSignal, Tensor]


class FrameStack(threading.local):
    """The running frames of one patched model in the current thread, innermost last."""

    def __init__(self) -> None:
        self.model: list[ModelFrame] = []
        self.tower: list[TowerFrame] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> FrameStack:
        return FrameStack()

    def __reduce__(self) -> tuple[type[FrameStack], tuple[()]]:
        return FrameStack, ()
