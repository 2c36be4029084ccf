"""What belongs to one running call of a patched model, kept per thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor


@dataclass(eq=False)
class TowerCall:
    """What the hooks of a tower reader captured during one run of the vision tower.

    Attributes:
        captured: by what it is ("q_proj", say) and layer.
    """

    captured: dict[tuple[str, int], Any] = field(default_factory=dict)


@dataclass(eq=False)
class ModelCall:
    """One running forward of the multimodal model.

    Attributes:
        inputs: the arguments of the call by name.
        visual_mask: bool `[batch, tokens]` on the CPU, true at the placeholders of visual tokens; None where there are none.
        attention_mask: the caller's 2-D mask as bool on the CPU, or None.
        encoded: per modality what the encoder returned, with the projected features per image in `pooler_output`.
        modality_masks: like `visual_mask`, per modality.
        compaction: set by the engine between the language model's entry and its exit.
        record: what the prefill kept before the first layer.
        layer_run: the running sequence where it differs from layer to layer, else None.
    """

    inputs: Mapping[str, Any]
    visual_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    encoded: dict[str, Any] = field(default_factory=dict)
    modality_masks: dict[str, Tensor] = field(default_factory=dict)
    compaction: Any = None
    layer_run: Any = None
    record: Any = None


class CallStack(threading.local):
    """The running frames of one patched model in the current thread, innermost last."""

    def __init__(self) -> None:
        self.model: list[ModelCall] = []
        self.tower: list[TowerCall] = []

    def __deepcopy__(self, memo: dict[int, Any]) -> CallStack:
        return CallStack()

    def __reduce__(self) -> tuple[type[CallStack], tuple[()]]:
        return CallStack, ()
