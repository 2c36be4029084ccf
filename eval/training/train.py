"""Train a shipped model again: `python -m vlmprune.eval.training.train MODEL --out DIR [--resume]`.

Each stage writes its weights to `DIR/{stage}.pt` every two minutes and its figures to `DIR/{stage}.log`. The finished
checkpoint, measured on the test set, is `DIR/{MODEL}`. tiny-llava-next goes on from tiny-llava's run, `--start DIR`. With
`--weights CHECKPOINT` only the last stages are run, on a finished checkpoint: those that drop background tokens.
"""

from __future__ import annotations

import argparse
import os
from functools import partial
from pathlib import Path

from .common.card import finish
from .common.pipeline import Pipeline, run_chains, run_stages
from .llava.schedule import PIPELINE as LLAVA
from .next.schedule import PIPELINE as NEXT
from .qwen.schedule import PIPELINE as QWEN
from .video.schedule import PIPELINE as VIDEO

PIPELINES: dict[str, Pipeline] = {pipeline.name: pipeline for pipeline in (LLAVA, NEXT, QWEN, VIDEO)}


def train(
    pipeline: Pipeline,
    out: Path,
    resume: bool = False,
    start: Path | None = None,
    stage: str | None = None,
    threads: int = 0,
    limit: int | None = None,
    weights: Path | None = None,
) -> None:
    """Run all stages, or only `stage` from the files of those before it; after all of them write and measure the checkpoint.

    Args:
        pipeline: what is trained.
        out: folder for stage files, logs and the checkpoint.
        resume: whether to go on from the stage files in `out`.
        start: folder of the training that this one goes on from.
        stage: name of the only stage to run.
        threads: threads to use in all; 0 takes the pipeline's default.
        limit: number of test items to measure, all by default.
        weights: checkpoint folder whose weights stand for all stages before the further ones.
    """
    out.mkdir(parents=True, exist_ok=True)
    open_workshop = partial(pipeline.workshop, out, resume, start)
    threads = threads or pipeline.threads or os.cpu_count() or 1
    if stage is not None:
        run_stages(open_workshop, (pipeline.stages[stage],), threads)
        return
    chains = pipeline.chains
    if weights is None:
        open_workshop().prepare()
    else:
        before, chains = pipeline.going_on()
        open_workshop().adopt(weights, pipeline.stages[before])
    run_chains(open_workshop, chains, threads)
    finish(pipeline, open_workshop(), limit, weights)


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.training.train", description=__doc__)
    parser.add_argument("model", choices=PIPELINES)
    parser.add_argument("--out", type=Path, required=True, help="folder for stage files, logs and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the stage files in the folder")
    parser.add_argument("--start", type=Path, help="folder of the training that tiny-llava-next goes on from")
    parser.add_argument("--weights", type=Path, help="checkpoint folder to go on from, with the further stages only")
    parser.add_argument("--stage", help="run only this stage, from the files of those before it")
    parser.add_argument("--threads", type=int, default=0, help="threads to use in all")
    options = parser.parse_args(arguments)
    pipeline = PIPELINES[options.model]
    if options.stage is not None and options.stage not in pipeline.stages:
        parser.error(f"--stage {options.stage!r}; allowed for {pipeline.name}: {', '.join(pipeline.stages)}")
    if options.weights is not None and (not pipeline.further or options.start or options.stage):
        can = ", ".join(name for name, known in PIPELINES.items() if known.further)
        parser.error(f"--weights {options.weights}: goes without --start and --stage, for {can}")
    if options.weights is None and (options.start is None) != (pipeline.starts_from is None):
        needed = (
            f"{pipeline.name} goes on from {pipeline.starts_from}'s folder" if pipeline.starts_from else "not needed"
        )
        parser.error(f"--start {options.start}: {needed}")
    return options


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    options = parse(arguments)
    train(
        PIPELINES[options.model], options.out, options.resume, options.start, options.stage, options.threads,
        weights=options.weights,
    )  # fmt: skip


if __name__ == "__main__":
    main()
