"""A shipped model's training: its schedule, its workshop, its card; and how the stages are run."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .loop import Stage
from .scenes import Scene
from .workshop import Workshop

Chains = tuple[tuple[tuple[Stage, ...], ...], ...]
"""The order of the stages: what stands in one inner group can run at the same time, chain by chain."""


@dataclass(frozen=True)
class Pipeline:
    """The training of one model.

    Attributes:
        name: the model's name, which its folder has too.
        model_class: its class in transformers.
        chains: the stages in their order.
        workshop: makes the parts.
        card: the text of the model card.
        large: whether it is measured on the larger test pictures too.
        starts_from: the model whose training it goes on from, if any.
        threads: threads to use in all by default (0: as many as the machine has).
        finish: what ends the training in place of `card.finish`, called with the same arguments.
        foreground: tells which visual tokens of a scene's picture show something, for the foreground oracle.
        further: the names of the stages that can also go on from a finished checkpoint, the last ones of all.
    """

    name: str
    model_class: str
    chains: Chains
    workshop: type[Workshop]
    card: Path
    large: bool = True
    starts_from: str | None = None
    threads: int = 0
    finish: Callable[..., dict[str, Any]] | None = None
    foreground: Callable[[Scene], Tensor] | None = None
    further: tuple[str, ...] = ()

    @property
    def stages(self) -> dict[str, Stage]:
        """Every stage by name, in order."""
        return {stage.name: stage for group in self.chains for chain in group for stage in chain}

    def going_on(self) -> tuple[str, Chains]:
        """The last stage of what a finished checkpoint went through, and the stages of `further`."""
        names = list(self.stages)
        return names[names.index(self.further[0]) - 1], ((tuple(self.stages[name] for name in self.further),),)


def run_stages(open_workshop: Callable[[], Workshop], stages: Sequence[Stage], threads: int) -> None:
    """Run stages one after the other in this process, each in a workshop of its own."""
    torch.set_num_threads(threads)
    for stage in stages:
        open_workshop().train(stage)


def run_chains(open_workshop: Callable[[], Workshop], groups: Chains, threads: int) -> None:
    """Run all stages; chains that do not wait for each other run at the same time where there are threads for it.

    `open_workshop` is sent to other processes, so it must be something that can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    for chains in groups:
        if len(chains) == 1 or threads < len(chains):
            for chain in chains:
                run_stages(open_workshop, chain, threads)
            continue
        share = threads // len(chains)
        processes = [context.Process(target=run_stages, args=(open_workshop, chain, share)) for chain in chains]
        for process in processes:
            process.start()
        for process, chain in zip(processes, chains, strict=True):
            process.join()
            if process.exitcode:
                names = ", ".join(stage.name for stage in chain)
                raise RuntimeError(f"the stages {names} ended with exit code {process.exitcode}")
