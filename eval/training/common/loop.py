"""The training loop that all stages share: schedule, progress, log file, resume checkpoints."""

from __future__ import annotations

import logging
import math
import os
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

Metrics = Mapping[str, float | Tensor]
Step = Callable[[Any, bool], tuple[Tensor, Metrics]]
"""Takes a batch and whether figures are wanted (they may cost time); gives the loss and figures for the log."""


@dataclass(frozen=True)
class Phase:
    """So many steps on batches of one plan (what the workshop's `make_batch` takes)."""

    steps: int
    plan: Any


@dataclass(frozen=True)
class Stage:
    """What is trained how long, on what, from what.

    Attributes:
        name: the name of its files.
        kind: what is trained; the workshop has a method `train_{kind}`.
        phases: steps and batches.
        rates: peak learning rates, one for each group of parameters.
        seed: of the batches.
        after: parts that are taken from earlier stages: (stage, part, part, ...); all its parts where none is named.
        settings: further arguments of the workshop's method.
        warmup: steps until the peak rate.
        floor: share of the peak rate at the end of the cosine.
        decay: weight decay.
        horizon: length of the cosine where the stage ends before it does (0: as long as the stage).
    """

    name: str
    kind: str
    phases: tuple[Phase, ...]
    rates: tuple[float, ...]
    seed: int
    after: tuple[tuple[str, ...], ...] = ()
    settings: Mapping[str, Any] = field(default_factory=dict)
    warmup: int = 100
    floor: float = 0.03
    decay: float = 0.05
    horizon: int = 0

    @property
    def steps(self) -> int:
        """Steps of all phases together."""
        return sum(phase.steps for phase in self.phases)

    def scale(self, step: int) -> float:
        """Share of the peak learning rate at a step: linear warm-up, then a cosine down to `floor`."""
        if step < self.warmup:
            return (step + 1) / self.warmup
        done = (step - self.warmup) / max(1, (self.horizon or self.steps) - self.warmup)
        return self.floor + (1 - self.floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def adamw(members: Sequence[Sequence[nn.Parameter]], stage: Stage) -> torch.optim.AdamW:
    """AdamW with the stage's peak rate and decay for each group of parameters."""
    return torch.optim.AdamW(
        [{"params": params, "peak": rate} for params, rate in zip(members, stage.rates, strict=True)],
        lr=stage.rates[0], betas=(0.9, 0.98), weight_decay=stage.decay,
    )  # fmt: skip


def run_stage(
    stage: Stage,
    parts: Mapping[str, nn.Module],
    groups: Iterable[Iterable[nn.Module]],
    step_fn: Step,
    out: Path,
    source: Callable[[Any, int, int], Iterator[Any]],
    resume: bool = True,
    every_s: float = 120.0,
    make_optimizer: Callable[[list[list[nn.Parameter]], Stage], Any] = adamw,
) -> None:
    """Train, and write `out/{stage}.pt` every `every_s` seconds and at the end.

    `parts` are all modules whose weights the file keeps; `groups` are the ones that learn, one group for each rate.
    `source` gives the batches of a plan and a seed from a number on; `make_optimizer` takes the place of AdamW.
    A finished stage that is run again with `resume` only loads its weights.
    """
    path, log = out / f"{stage.name}.pt", _logger(out, stage.name)
    members = [[p for module in group for p in module.parameters()] for group in groups]
    optimizer = make_optimizer(members, stage)
    step, spent = 0, 0.0
    if resume and path.exists():
        state = torch.load(path, weights_only=True)
        load_parts(parts, state["parts"])
        step, spent = state["step"], state["seconds"]
        if step >= stage.steps:
            return
        optimizer.load_state_dict(state["optimizer"])
    log.info(
        "stage %s: %d steps from %d, %.2f M parameters learn",
        stage.name,
        stage.steps,
        step,
        sum(p.numel() for m in members for p in m) / 1e6,
    )
    started = saved = time.monotonic()
    torch.manual_seed(stage.seed + step)
    figures: dict[str, list[float]] = defaultdict(list)
    bar = tqdm(total=stage.steps, initial=step, desc=stage.name, mininterval=5)
    end = 0
    for phase in stage.phases:
        begin, end = end, end + phase.steps
        if step >= end:
            continue
        batches = source(phase.plan, stage.seed + begin, step - begin)
        while step < end:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * stage.scale(step)
            wanted = step % 10 == 0
            loss, metrics = step_fn(next(batches), wanted)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_([p for params in members for p in params if p.grad is not None], 1.0)
            optimizer.step()
            step += 1
            bar.update()
            if wanted:
                for name, value in {"loss": loss, **metrics}.items():
                    figures[name].append(value.item() if isinstance(value, Tensor) else value)
            if step % 50 == 0:
                seconds = spent + time.monotonic() - started
                words = " ".join(f"{name} {sum(v) / len(v):.3f}" for name, v in figures.items() if v)
                log.info("%s step %d of %d, %.0f s: %s", stage.name, step, stage.steps, seconds, words)
                figures.clear()
            if time.monotonic() - saved > every_s or step == stage.steps:
                saved = time.monotonic()
                _save(path, parts, optimizer, step, spent + saved - started)
        del batches
    bar.close()


def _save(path: Path, parts: Mapping[str, nn.Module], optimizer: Any, step: int, seconds: float) -> None:
    state = {
        "parts": {name: module.state_dict() for name, module in parts.items()},
        "optimizer": optimizer.state_dict(),
        "step": step,
        "seconds": seconds,
    }
    torch.save(state, path.with_suffix(".new"))
    os.replace(path.with_suffix(".new"), path)


def load_parts(parts: Mapping[str, nn.Module], states: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Load every part that both sides have."""
    for name, module in parts.items():
        if name in states:
            module.load_state_dict(states[name])


def _logger(out: Path, name: str) -> logging.Logger:
    log = logging.getLogger(f"{__name__}.{name}")
    if not log.handlers:
        handler = logging.FileHandler(out / f"{name}.log")
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
        log.addHandler(handler)
        log.setLevel(logging.INFO)
    return log
