"""How the training scripts run their stages: options, one stage after the other, chains of stages side by side."""

from __future__ import annotations

import argparse
import multiprocessing
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch


def stage_parser(
    prog: str, description: str | None, stages: Sequence[str], threads: int = 0
) -> argparse.ArgumentParser:
    """The options that every training script has; `threads` is the default (0: as many as the machine has)."""
    parser = argparse.ArgumentParser(prog=prog, description=description)
    parser.add_argument("--out", type=Path, required=True, help="folder for stage files, logs and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the stage files in the folder")
    parser.add_argument("--stage", choices=stages, help="run only this stage, from the files of those before it")
    parser.add_argument("--threads", type=int, default=threads or os.cpu_count() or 1, help="threads to use in all")
    return parser


def run_stages(open_workshop: Callable[[], Any], stages: Sequence[str], threads: int) -> None:
    """Run stages one after the other in this process, each in a workshop of its own."""
    torch.set_num_threads(threads)
    for stage in stages:
        getattr(open_workshop(), f"train_{stage}")()


def run_chains(open_workshop: Callable[[], Any], steps: Sequence[Sequence[Sequence[str]]], threads: int) -> None:
    """Run all stages; chains that do not wait for each other run at the same time where there are threads for it.

    `open_workshop` is sent to other processes, so it must be something that can be pickled.
    """
    context = multiprocessing.get_context("spawn")
    for chains in steps:
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
                raise RuntimeError(f"the stages {', '.join(chain)} ended with exit code {process.exitcode}")
