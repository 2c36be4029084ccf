"""Captions for a folder of pictures, in batches, with a quarter of the visual tokens.

python examples/caption_folder.py FOLDER [MODEL]
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune

TINY = Path(__file__).parents[1] / "eval" / "checkpoints" / "tiny-llava"
BATCH = 8


def main(folder: str, model_name: str = str(TINY)) -> dict[str, str]:
    """Print and return the caption of every picture."""
    model = AutoModelForImageTextToText.from_pretrained(model_name).eval()
    processor = AutoProcessor.from_pretrained(model_name)
    processor.tokenizer.padding_side = "left"
    vlmprune.apply(model, "divprune", keep=0.25)
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "Describe this image."}]}]
    prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
    paths = sorted(path for path in Path(folder).iterdir() if path.suffix.lower() in {".jpg", ".jpeg", ".png"})
    captions = {}
    for first in range(0, len(paths), BATCH):
        batch = paths[first : first + BATCH]
        images = [[Image.open(path).convert("RGB")] for path in batch]
        inputs = processor(text=[prompt] * len(batch), images=images, padding=True, return_tensors="pt")
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
        texts = processor.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        for path, text in zip(batch, texts, strict=True):
            captions[path.name] = text.strip()
            print(f"{path.name}\t{text.strip()}")
    return captions


if __name__ == "__main__":
    main(*sys.argv[1:3])
