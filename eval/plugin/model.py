"""The model that `lmms-eval --model vlmprune` runs.

Everything that decides how tokens are pruned is part of `--model_args`, which lmms-eval's response cache has in its key, so a
cache can never hand the answers of one method or budget to another.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack, nullcontext
from dataclasses import replace
from typing import Any

from lmms_eval.api.instance import GenerationResult, Instance

import vlmprune
from vlmprune.budget import check_keep
from vlmprune.errors import ParameterError
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.questions import is_counted
from vlmprune.eval.accuracy.videos import MOST_FRAMES
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.lower_resolution import LOWER_RESOLUTION
from vlmprune.eval.run.cells import FULL, Cell
from vlmprune.eval.run.text_towers import equipped, text_tower_of
from vlmprune.eval.speed.hook_clock import HookClock
from vlmprune.methods.base import Method

from .counts import counts_of, log_means


class Vlmprune(LiveModel):
    """A pruned model built from `--model_args`.

    It is of lmms-eval's simple protocol, so that multiple choice needs no flag.

    `pretrained` is a shipped name, folder or hub name; `method` a method's name, "lower_resolution" or "full"; `keep` a share or
    count; `dtype` and `device` as for `vlmprune bench`; `video_frames` the most frames read of a video file; all else goes to
    the method. Each process of several takes its own GPU.
    """

    is_simple = True

    def __init__(
        self,
        pretrained: str,
        method: str = "divprune",
        keep: float | int | None = None,
        dtype: str = "auto",
        device: str | None = None,
        video_frames: int = MOST_FRAMES,
        batch_size: int | str | None = 1,
        max_batch_size: int | None = None,
        **parameters: Any,
    ) -> None:
        if not str(batch_size or 1).isdigit() or int(batch_size or 1) < 1:
            raise ParameterError(f"batch_size={batch_size!r}; allowed: a whole number from 1.")
        loaded = load_model(str(pretrained), dtype, device or "auto")
        cell = Cell(method, keep if keep is None else check_keep(keep))
        applied: Method | None = None
        if method == LOWER_RESOLUTION:
            if keep is None or parameters:
                raise ParameterError(f"method={method!r} takes a keep and nothing else.")
        elif method != FULL:
            named = replace(cell, parameters=tuple(parameters.items()))
            (equipped_cell,) = equipped([named], text_tower_of(loaded.source), loaded.processor)
            applied = equipped_cell.make_method()
            vlmprune.apply(loaded.model, method, keep, **equipped_cell.arguments)
        elif keep is not None or parameters:
            given = ", ".join([*(["keep"] if keep is not None else []), *parameters])
            raise ParameterError(f"method={FULL!r} prunes nothing and takes no {given}.")
        super().__init__(
            loaded.model,
            loaded.processor,
            batch_size=int(batch_size or 1),
            pruned=cell.is_pruned,
            resolution=cell.resolution(loaded.model, loaded.processor),
            video_frames=int(video_frames),
        )
        self._method = applied
        self._contexts = ExitStack()
        if cell.method == LOWER_RESOLUTION:
            self._contexts.enter_context(cell.applied_to(loaded.model))

    def generate_until(self, requests: list[Instance]) -> list[GenerationResult]:
        """Answer every request, with what it cost (see `RequestCounts`); the means go to lmms-eval's throughput."""
        return self._counted(requests, super().generate_until)

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Score every continuation, with what that cost."""
        return self._counted(requests, super().loglikelihood)

    def _counted(
        self, requests: list[Instance], answer: Callable[[list[Instance]], list[Any]]
    ) -> list[GenerationResult]:
        first, seconds = len(self.records), self.model_seconds
        clock = HookClock(self.device)
        with clock.watching(self._model) if self.pruned else nullcontext():
            found = answer(requests)
        records = self.records[first:]
        counts = iter(counts_of(self._model, records, self._method))
        log_means(self._model, records, self._method, self.model_seconds - seconds, clock.in_hooks)
        results = []
        for request, one in zip(requests, found, strict=True):
            text = one.text if isinstance(one, GenerationResult) else one
            results.append(GenerationResult(text, next(counts) if is_counted(request) else None))
        return results
