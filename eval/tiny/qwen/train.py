"""Train tiny-qwen2.5-vl: ``python -m vlmprune.eval.tiny.qwen.train --out DIR [--resume]``.

Each stage writes its weights to ``DIR/{stage}.pt`` every two minutes and its figures to ``DIR/{stage}.log``. The tower learns
alone from nothing, on labels of patches and tokens and on the code of visual tokens read off the shipped tiny-llava; the
language model, which starts from tiny-llava's, learns alone on symbolic tokens; then everything learns together. The finished
checkpoint, measured on the test set, is ``DIR/tiny-qwen2.5-vl``.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
from pathlib import Path

import torch

from .card import finish
from .stages import CHAINS, STAGES, Workshop


def run(stages: tuple[str, ...], out: Path, resume: bool, threads: int) -> None:
    """Run stages one after the other in this process."""
    torch.set_num_threads(threads)
    for stage in stages:
        getattr(Workshop(out, resume), f"train_{stage}")()


def run_all(out: Path, resume: bool, threads: int) -> None:
    """Run all stages; chains that do not wait for each other run at the same time where there are threads for it."""
    context = multiprocessing.get_context("spawn")
    Workshop(out).take_codes()
    for chains in CHAINS:
        if len(chains) == 1 or threads < len(chains):
            for chain in chains:
                run(chain, out, resume, threads)
            continue
        share = threads // len(chains)
        processes = [context.Process(target=run, args=(chain, out, resume, share)) for chain in chains]
        for process in processes:
            process.start()
        for process, chain in zip(processes, chains, strict=True):
            process.join()
            if process.exitcode:
                raise RuntimeError(f"the stages {', '.join(chain)} ended with exit code {process.exitcode}")


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are asked for; after the last one, write and measure the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.tiny.qwen.train", description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder for stage files, logs and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the stage files in the folder")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage, from the files of those before it")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="threads to use in all")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    if options.stage:
        run((options.stage,), options.out, options.resume, options.threads)
        return
    run_all(options.out, options.resume, options.threads)
    finish(options.out)


if __name__ == "__main__":
    main()
