"""Grow tiny-llava into tiny-llava-next: ``python -m vlmprune.eval.tiny.next.train --start DIR --out DIR [--resume]``.

``--start`` is the folder of ``vlmprune.eval.tiny.train``. Each stage writes its weights to ``{out}/{stage}.pt`` every two
minutes and its figures to ``{out}/{stage}.log``. The finished checkpoint, measured on the test set, is
``{out}/tiny-llava-next``.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from .card import finish
from .stages import STAGES, Workshop


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are asked for; after the last one, write and measure the checkpoint."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.tiny.next.train", description=__doc__)
    parser.add_argument("--start", type=Path, required=True, help="folder of tiny-llava's training")
    parser.add_argument("--out", type=Path, required=True, help="folder for stage files, logs and the checkpoint")
    parser.add_argument("--resume", action="store_true", help="go on from the stage files in the folder")
    parser.add_argument("--stage", choices=STAGES, help="run only this stage, from the files of those before it")
    parser.add_argument("--threads", type=int, default=1, help="threads to use")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(options.threads)
    for stage in (options.stage,) if options.stage else STAGES:
        getattr(Workshop(options.start, options.out, options.resume), f"train_{stage}")()
    if not options.stage:
        finish(options.start, options.out)


if __name__ == "__main__":
    main()
