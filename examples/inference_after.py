"""The script of `inference_before.py` with pruning: the import and one line more.

python examples/inference_after.py PICTURE "QUESTION" [MODEL]
"""

import sys
from pathlib import Path

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune

TINY = str(Path(__file__).parents[1] / "eval" / "checkpoints" / "tiny-llava")

picture, question, name = sys.argv[1], sys.argv[2], (sys.argv[3:] or [TINY])[0]
model = AutoModelForImageTextToText.from_pretrained(name)
vlmprune.apply(model, "divprune", keep=0.25)
processor = AutoProcessor.from_pretrained(name)
messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
prompt = processor.apply_chat_template(messages, add_generation_prompt=True)
inputs = processor(text=prompt, images=Image.open(picture).convert("RGB"), return_tensors="pt")
output = model.generate(**inputs, max_new_tokens=16, do_sample=False)
print(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip())
