"""In-context prompts: four images with questions and answers, then a query image, two such prompts in a batch, pruned by CATP.

    python examples/in_context.py [MODEL]

MODEL is a folder or name of a LLaVA; the small one of this repository if not given.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image, ImageDraw
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune

TINY = Path(__file__).parents[1] / "eval" / "checkpoints" / "tiny-llava"
SHOTS = ("red", "blue", "green", "yellow")


def picture(colour: str, side: int = 192) -> Image.Image:
    """Return a circle of that colour on grey."""
    image = Image.new("RGB", (side, side), "grey")
    ImageDraw.Draw(image).ellipse([side // 4, side // 4, side // 2, side // 2], fill=colour)
    return image


def in_context_prompt(shots: tuple[str, ...], query: str) -> tuple[str, list[Image.Image]]:
    """Return the text of a prompt whose images are demonstrations but for the last, and these images."""
    question = "what colour is the circle?"
    shown = [f"USER: <image>\n{question} ASSISTANT: {colour}" for colour in shots]
    text = "\n".join([*shown, f"USER: <image>\n{question} ASSISTANT:"])
    return text, [picture(colour) for colour in (*shots, query)]


def main(model_name: str = str(TINY)) -> vlmprune.RunRecord:
    """Answer two prompts with what CATP keeps, print it, and return the record of the prefill."""
    model = AutoModelForImageTextToText.from_pretrained(model_name).eval()
    processor = AutoProcessor.from_pretrained(model_name)
    processor.tokenizer.padding_side = "left"
    prompts = [in_context_prompt(SHOTS, "purple"), in_context_prompt(SHOTS[::-1], "red")]
    inputs = processor(
        text=[text for text, _ in prompts],
        images=[images for _, images in prompts],
        padding=True,
        return_tensors="pt",
    ).to(model.device)
    # Two thirds of the visual tokens go; K is the layer after which demonstrations are cut.
    with torch.no_grad(), vlmprune.pruned(model, "catp", ratio=2 / 3):
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        run = vlmprune.last_run(model)
    answers = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    for row, answer in enumerate(answers):
        kept = [f"{len(image.kept)} of {image.total}" for image in run.images if image.batch_index == row]
        print(f"prompt {row}: demonstrations {', '.join(kept[:-1])}; query {kept[-1]}; answer {answer.strip()!r}")
        print(f"  visual tokens by layer: {run.visual_tokens_per_layer[row]}")
    return run


if __name__ == "__main__":
    main(*sys.argv[1:2])
