"""A chat about one picture over several turns on one pruned cache: the picture is encoded and pruned once.

python examples/chat.py PICTURE [MODEL]
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, DynamicCache

import vlmprune

TINY = Path(__file__).parents[1] / "eval" / "checkpoints" / "tiny-llava"
QUESTIONS = ("What color is the circle?", "Is there a square?", "How many shapes are there?")


def main(picture: str, model_name: str = str(TINY), questions: Sequence[str] = QUESTIONS) -> list[str]:
    """Print and return the answers."""
    model = AutoModelForImageTextToText.from_pretrained(model_name).eval()
    processor = AutoProcessor.from_pretrained(model_name)
    vlmprune.apply(model, "divprune", keep=0.25)
    image = Image.open(picture).convert("RGB")
    messages, answers = [], []
    cache = DynamicCache(config=model.config.get_text_config())
    for turn, question in enumerate(questions):
        shown = [{"type": "image"}] if turn == 0 else []
        messages.append({"role": "user", "content": [*shown, {"type": "text", "text": question}]})
        prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
        inputs = processor(text=prompt, images=image, return_tensors="pt")
        if turn:
            # The picture is in the cache already.
            inputs.pop("pixel_values")
        with torch.no_grad():
            output = model.generate(**inputs, past_key_values=cache, max_new_tokens=8, do_sample=False)
        answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})
        answers.append(answer)
        print(f"> {question}\n{answer}   ({cache.layers[0].keys.shape[2]} of {cache.get_seq_length()} tokens held)")
    return answers


if __name__ == "__main__":
    main(*sys.argv[1:3])
