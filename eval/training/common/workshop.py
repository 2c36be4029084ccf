"""The parts of a model in training, and how a stage of a schedule is run on them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PreTrainedModel

from .language import Prompts
from .loop import Stage, Step, adamw, load_parts, run_stage
from .stream import stream_from


class Workshop:
    """All parts of a model in training, by name, as the stage files in `out` keep them.

    A subclass makes the parts and has a method `train_{kind}` for each kind of stage.

    Attributes:
        part_names: attributes that are parts.
        make_batch: a batch of a stage's plan, `make_batch(plan, prompts, rng)`.
    """

    part_names: ClassVar[tuple[str, ...]]
    make_batch: ClassVar[Callable[..., Any]]
    prompts: Prompts

    def __init__(self, out: Path, resume: bool = True, start: Path | None = None) -> None:
        self.out, self.resume, self.start = out, resume, start
        torch.manual_seed(0)

    @property
    def parts(self) -> dict[str, nn.Module]:
        """Every part by name."""
        return {name: getattr(self, name) for name in self.part_names}

    def prepare(self) -> None:
        """Make what all stages need, before the first of them."""

    def export(self, folder: Path) -> None:
        """Write the parts as an ordinary checkpoint folder."""
        raise NotImplementedError

    def take(self, model: PreTrainedModel) -> None:
        """Take the weights of a checkpoint that `export` wrote; what only training uses stays as it is."""
        raise NotImplementedError

    def adopt(self, folder: Path, stage: Stage) -> None:
        """Let a checkpoint folder's weights count as what a stage ended with."""
        self.take(AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32))
        parts = {name: part.state_dict() for name, part in self.parts.items()}
        torch.save(
            {"parts": parts, "optimizer": {}, "step": stage.steps, "seconds": 0.0}, self.out / f"{stage.name}.pt"
        )

    def load(self, stage: str, *names: str) -> None:
        """Take parts (all when none is named) from a stage's file."""
        states = torch.load(self.out / f"{stage}.pt", weights_only=True)["parts"]
        load_parts({name: self.parts[name] for name in names or self.parts}, states)

    def train(self, stage: Stage) -> None:
        """Run a stage on what the stages before it made."""
        for earlier in stage.after:
            self.load(*earlier)
        getattr(self, f"train_{stage.kind}")(stage, **stage.settings)

    def run(
        self,
        stage: Stage,
        names: Iterable[str],
        learn: Sequence[Iterable[nn.Module]],
        step: Step,
        make_optimizer: Callable[[list[list[nn.Parameter]], Stage], Any] = adamw,
    ) -> None:
        """Train the groups of modules in `learn`; the stage's file keeps the parts `names`."""
        parts = {name: self.parts[name] for name in names}
        run_stage(stage, parts, learn, step, self.out, self.stream, self.resume, make_optimizer=make_optimizer)

    def stream(self, plan: Any, seed: int, start: int = 0) -> Iterator[Any]:
        """The batches of a plan and a seed from number `start` on."""
        return stream_from(partial(type(self).make_batch, plan, self.prompts), seed, start)
