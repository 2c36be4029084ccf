"""Which method and which budget, for this model and your pictures: the cheapest that leaves (nearly) every answer as it was.

python examples/tune.py PICTURES [MODEL]

PICTURES is a folder, or a .jsonl file with a prompt for every picture. `vlmprune tune` is the same on the command line.
"""

from __future__ import annotations

import sys
from pathlib import Path

from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune

TINY = Path(__file__).parents[1] / "eval" / "checkpoints" / "tiny-llava"


def main(pictures: str, model_name: str = str(TINY), minutes: float = 10) -> str:
    """Print and return the line to paste."""
    model = AutoModelForImageTextToText.from_pretrained(model_name).eval()
    processor = AutoProcessor.from_pretrained(model_name)
    print("first guess:", vlmprune.recommend(model).line)
    found = vlmprune.tune(
        model,
        processor,
        pictures,
        same_answers=0.9,
        methods=["divprune", "fastervlm", "scope", "pool"],
        new_tokens=8,
        minutes=minutes,
    )
    print(found.sentence)
    print(found.line)
    return found.line


if __name__ == "__main__":
    main(*sys.argv[1:3])
