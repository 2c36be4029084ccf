"""Train a text tower for a shipped model's CLIP tower: `python -m vlmprune.eval.training.text_tower.train MODEL --out DIR`.

The vision tower stays as it is shipped. Writes an ordinary CLIP folder (model, tokenizer, card) to `DIR`.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from vlmprune.eval.models.names import resolve_model
from vlmprune.eval.run.machine import describe_machine

from ..common.questions import TASKS
from .learn import Lesson, learn
from .measure import measure
from .pair import clip_model, clip_tokenizer, export_pair
from .pictures import TILES, see

CARD = Path(__file__).with_name("card.md")


def train(name: str, out: Path, pictures: int, lesson: Lesson, tested: int) -> dict[str, dict[str, float]]:
    """Train, export and measure; returns what `measure` found.

    Args:
        name: the shipped model.
        out: folder for the CLIP model.
        pictures: training pictures.
        lesson: how it is trained.
        tested: test pictures to measure on.
    """
    torch.manual_seed(lesson.seed)
    start = perf_counter()
    loaded = AutoModelForImageTextToText.from_pretrained(resolve_model(name), dtype=torch.float32).eval()
    tower: Any = loaded.model.vision_tower
    layer = int(loaded.config.vision_feature_layer)
    tokenizer = clip_tokenizer()
    model = clip_model(tower, loaded.config.vision_config, tokenizer)
    seen = see(tower, name, pictures, layer)

    def report(step: int, whole: float, parts: float) -> None:
        if step % 100 == 0:
            print(f"step {step}: pictures {whole:.3f}, patches {parts:.3f}", flush=True)

    learn(model, tokenizer, seen, lesson, report)
    seconds = perf_counter() - start
    export_pair(model.eval(), tokenizer, out)
    found = measure(out, tower, name, layer, tested)
    rows = [
        f"| {way} | " + " | ".join(f"{100 * figures[task]:.1f}" for task in TASKS) + " |"
        for way, figures in found.items()
    ]
    head = [f"| patches of | {' | '.join(TASKS)} |", f"|{'---|' * (len(TASKS) + 1)}"]
    card = CARD.read_text(encoding="utf-8").format(
        name=name,
        parameters=model.num_parameters() / 1e6,
        megabytes=(out / "model.safetensors").stat().st_size / 1e6,
        pictures=tested,
        table="\n".join([*head, *rows]),
        drawn=pictures,
        steps=lesson.steps,
        seconds=seconds,
        machine=describe_machine()["cpu"],
    )
    (out / "README.md").write_text(card, encoding="utf-8")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Run the command."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.eval.training.text_tower.train", description=__doc__)
    parser.add_argument("model", choices=TILES)
    parser.add_argument("--out", type=Path, required=True, help="folder for the CLIP model")
    parser.add_argument("--pictures", type=int, default=768, help="training pictures")
    parser.add_argument("--steps", type=int, default=Lesson.steps)
    parser.add_argument("--test-pictures", type=int, default=100)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    torch.set_num_threads(options.threads)
    print(train(options.model, options.out, options.pictures, Lesson(steps=options.steps), options.test_pictures))


if __name__ == "__main__":
    main()
