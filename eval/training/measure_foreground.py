"""Measure the foreground oracle: `python -m vlmprune.eval.training.measure_foreground MODEL CHECKPOINT [--limit N]`.

Prints the accuracy with all visual tokens, with exactly those that show a thing or a glyph, and with as many drawn at random.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from .common.evaluate import ORACLE_MODES, measure_oracle
from .train import PIPELINES


def main(arguments: list[str] | None = None) -> None:
    """Print the figures as JSON."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.training.measure_foreground", description=__doc__)
    known = {name: pipeline.foreground for name, pipeline in PIPELINES.items() if pipeline.foreground is not None}
    parser.add_argument("model", choices=known)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--limit", type=int, help="only the first pictures")
    options = parser.parse_args(arguments)
    model = AutoModelForImageTextToText.from_pretrained(options.checkpoint, dtype=torch.float32).eval()
    processor = AutoProcessor.from_pretrained(options.checkpoint)
    modes = ("full", *ORACLE_MODES)
    figures = measure_oracle(model, processor, known[options.model], options.limit, modes)
    print(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
