"""Several pictures of different sizes in one prompt, on Qwen2.5-VL; a budget for each request without applying again.

python examples/several_images.py PICTURE PICTURE [...]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune

MODEL = Path(__file__).parents[1] / "eval" / "checkpoints" / "tiny-qwen2.5-vl"


def main(*pictures: str) -> list[list[int]]:
    """Print the answers at three budgets; returns the visual tokens kept of each picture."""
    model = AutoModelForImageTextToText.from_pretrained(MODEL).eval()
    processor = AutoProcessor.from_pretrained(MODEL)
    images = [Image.open(picture).convert("RGB") for picture in pictures]
    content = [{"type": "image"} for _ in images] + [{"type": "text", "text": "How many circles are there?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], images=images, return_tensors="pt")
    vlmprune.apply(model, "divprune", keep=0.5)
    kept = []
    for keep in (0.5, 0.25, 32):
        with torch.no_grad(), vlmprune.options(model, keep=keep):
            output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        print(f"keep={keep}: {answer!r}\n{vlmprune.last_run(model)}")
        kept.append([len(image.kept) for image in vlmprune.last_run(model).images])
    return kept


if __name__ == "__main__":
    main(*sys.argv[1:])
