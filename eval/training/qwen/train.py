"""Train tiny-qwen2.5-vl: `python -m vlmprune.eval.training.qwen.train --out DIR [--resume]`.

Each stage writes its weights to `DIR/{stage}.pt` every two minutes and its figures to `DIR/{stage}.log`. The tower learns
alone from nothing, on labels of patches and tokens and on the code of visual tokens read off the shipped tiny-llava; the
language model, which starts from tiny-llava's, learns alone on symbolic tokens; then everything learns together. The finished
checkpoint, measured on the test set, is `DIR/tiny-qwen2.5-vl`.
"""

from __future__ import annotations

from functools import partial

from ..common.chains import run_chains, run_stages, stage_parser
from .card import finish
from .stages import CHAINS, STAGES, Workshop


def main(arguments: list[str] | None = None) -> None:
    """Run the stages that are asked for; after the last one, write and measure the checkpoint."""
    options = stage_parser("python -m vlmprune.eval.training.qwen.train", __doc__, STAGES).parse_args(arguments)
    options.out.mkdir(parents=True, exist_ok=True)
    open_workshop = partial(Workshop, options.out, options.resume)
    if options.stage:
        run_stages(open_workshop, (options.stage,), options.threads)
        return
    open_workshop().take_codes()
    run_chains(open_workshop, CHAINS, options.threads)
    finish(options.out)


if __name__ == "__main__":
    main()
