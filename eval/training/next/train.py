"""Grow tiny-llava into tiny-llava-next: `python -m vlmprune.eval.training.next.train --start DIR --out DIR [--resume]`.

`--start` is the folder of `vlmprune.eval.training.llava.train`. Each stage writes its weights to `{out}/{stage}.pt` every
two minutes and its figures to `{out}/{stage}.log`. The finished checkpoint, measured on the test set, is
`{out}/tiny-llava-next`.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

from ..common.chains import run_stages, stage_parser
from .card import finish
from .stages import STAGES, Workshop


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are asked for; after the last one, write and measure the checkpoint."""
    parser = stage_parser("python -m vlmprune.eval.training.next.train", __doc__, STAGES, threads=1)
    parser.add_argument("--start", type=Path, required=True, help="folder of tiny-llava's training")
    options = parser.parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    open_workshop = partial(Workshop, options.start, options.out, options.resume)
    run_stages(open_workshop, (options.stage,) if options.stage else STAGES, options.threads)
    if not options.stage:
        finish(options.start, options.out)


if __name__ == "__main__":
    main()
