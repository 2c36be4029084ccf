"""Train tiny-llava from nothing: `python -m vlmprune.eval.training.llava.train --out DIR [--resume]`.

Each stage writes its weights to `DIR/{stage}.pt` every two minutes and its figures to `DIR/{stage}.log`. The tower
learns alone on labels of the patches while the language model learns alone on symbolic tokens; then come the projector and
everything together. The finished checkpoint, measured on the test set, is `DIR/tiny-llava`.
"""

from __future__ import annotations

from functools import partial

from ..common.chains import run_chains, run_stages, stage_parser
from .card import finish
from .stages import CHAINS, STAGES, Workshop


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are asked for; after the last one, write and measure the checkpoint."""
    options = stage_parser("python -m vlmprune.eval.training.llava.train", __doc__, STAGES).parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    open_workshop = partial(Workshop, options.out, options.resume)
    if options.stage:
        run_stages(open_workshop, (options.stage,), options.threads)
        return
    run_chains(open_workshop, CHAINS, options.threads)
    finish(options.out)


if __name__ == "__main__":
    main()
