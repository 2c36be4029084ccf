"""Encodings of one request that several methods measured on it share, with what capturing their signals took."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.tower.encoded_visuals import encoded_visuals
from vlmprune.patches.tower.encoder_calls import EncoderCall


@dataclass(frozen=True, eq=False)
class Encoding:
    """What one run of tower and projector gave.

    Attributes:
        output: what the host's call returned.
        captured: what the tower's hooks kept for the signals.
        seconds: what these hooks took.
    """

    output: Any
    captured: Mapping[Any, Any]
    seconds: float

    def again(self, call: EncoderCall) -> Any:
        """Return the output as if the tower had run in `call`, its captures handed to the running `TowerCall`."""
        call.calls.tower[-1].captured.update(self.captured)
        # What a call notes on its output is not for the next one.
        return copy.copy(self.output)


class SharedEncodings:
    """Encodings by modality and by the signals that are read of the tower: methods that read the same share one.

    They are those of one request, and of methods that leave tower and projector as they are.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[str, tuple[VisionSignal, ...]], Encoding] = {}

    def find(self, call: EncoderCall) -> Encoding | None:
        """Return the encoding that `call` would give, or None."""
        return self._known.get((call.modality, call.signals))

    def keep(self, modality: str, signals: Sequence[VisionSignal], output: Any, captured: Any, seconds: float) -> None:
        """Remember an encoding; not one that a call inside the host's call has read already."""
        if encoded_visuals(output) is None:
            self._known[modality, tuple(signals)] = Encoding(copy.copy(output), dict(captured), seconds)

    def forget_signals(self) -> None:
        """Let signals be captured anew, so that every round measures it."""
        self._known = {key: known for key, known in self._known.items() if not key[1]}
