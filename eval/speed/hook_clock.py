"""The time that an applied method spends in its own hooks."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from transformers import PreTrainedModel

from vlmprune.patches.tower.encoder_calls import EncoderCall

from .rounds import wait_for
from .shared_encodings import SharedEncodings

_TABLES = ("_forward_pre_hooks", "_forward_hooks")


class HookClock:
    """Sums the seconds in all hooks of a model, and apart from them those of encoding the pictures.

    Everything that an applied method adds to a call happens in its hooks: reading the tower's attention, scores, picking,
    compaction, and handing the result back in the caller's shape.

    Attributes:
        in_hooks: seconds in hooks, those of a shared encoding as they were when it ran.
        in_tower: seconds of encoding the pictures, without hooks.
        from_before: the part of `in_hooks` that an encoding took which did not run again.
    """

    def __init__(self, device: torch.device, clock: Callable[[], float] = time.perf_counter) -> None:
        self.device, self.clock = device, clock
        self.reset()

    def reset(self) -> None:
        """Start again at 0."""
        self.in_hooks = self.in_tower = self.from_before = 0.0
        self._running: list[str] = []
        self._since = 0.0

    @contextmanager
    def watching(self, model: PreTrainedModel, encodings: SharedEncodings | None = None) -> Iterator[HookClock]:
        """Time the hooks that `model` carries now; they are as before afterwards.

        With `encodings` the tower only runs for what is not among them yet.
        """
        tables = [getattr(module, name) for module in model.modules() for name in _TABLES]
        before = [dict(table) for table in tables]
        calls = [(name, value) for name, value in vars(model.model).items() if isinstance(value, EncoderCall)]
        encodes = [encoder.encode for _, encoder in calls]
        for table in tables:
            for key, hook in table.items():
                table[key] = self._timed(hook, "hooks")
        for (name, encoder), encode in zip(calls, encodes, strict=True):
            once = encode if encodings is None else self._once(encoder, encode, encodings)
            encoder.encode = self._timed(once, "tower")
            vars(model.model)[name] = self._timed(encoder, "hooks")
        try:
            yield self
        finally:
            for (name, encoder), encode in zip(calls, encodes, strict=True):
                vars(model.model)[name] = encoder
                encoder.encode = encode
            for table, hooks in zip(tables, before, strict=True):
                for key, hook in hooks.items():
                    table[key] = hook

    def _once(self, call: EncoderCall, encode: Callable[..., Any], encodings: SharedEncodings) -> Callable[..., Any]:
        @wraps(encode)
        def once(*args: Any, **kwargs: Any) -> Any:
            known = encodings.find(call)
            if known is not None:
                self.in_hooks += known.seconds
                self.from_before += known.seconds
                return known.again(call)
            before = self.in_hooks
            output = encode(*args, **kwargs)
            captured = call.calls.tower[-1].captured
            encodings.keep(call.modality, call.signals, output, captured, self.in_hooks - before)
            return output

        return once

    def _timed(self, call: Callable[..., Any], what: str) -> Callable[..., Any]:
        @wraps(call)
        def timed(*args: Any, **kwargs: Any) -> Any:
            self._switch()
            self._running.append(what)
            try:
                return call(*args, **kwargs)
            finally:
                self._switch()
                self._running.pop()

        return timed

    def _switch(self) -> None:
        """Book the time since the last switch on what ran until now."""
        wait_for(self.device)
        now = self.clock()
        if self._running:
            # A hook inside the tower is the method's, a hook inside a hook is counted once.
            if self._running[-1] == "hooks":
                self.in_hooks += now - self._since
            else:
                self.in_tower += now - self._since
        self._since = now
