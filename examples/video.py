"""A clip with 40 % of its visual tokens, and how many tokens each frame keeps.

    python examples/video.py [CLIP] [MODEL]

Without a clip a made-up one is shown: a still picture that changes once.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune.eval.pictures.sources import read_video

TINY = Path(__file__).parents[1] / "eval" / "checkpoints" / "tiny-qwen2.5-vl"


def made_up_clip(frames: int = 8, side: int = 128) -> np.ndarray:
    """Return a grey clip in which a red square appears half way, uint8 `[frames, height, width, 3]`."""
    clip = np.full((frames, side, side, 3), 128, dtype=np.uint8)
    clip[frames // 2 :, side // 4 : side // 2, side // 4 : side // 2] = (220, 40, 40)
    return clip


def main(clip: str | None = None, model_name: str = str(TINY)) -> list[int]:
    """Print the answer and return the visual tokens that each frame (or pair of frames) keeps."""
    model = AutoModelForImageTextToText.from_pretrained(model_name).eval()
    processor = AutoProcessor.from_pretrained(model_name)
    frames = made_up_clip() if clip is None else read_video(clip)
    content = [{"type": "video"}, {"type": "text", "text": "What color is the square?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = processor(text=[prompt], videos=[frames], do_sample_frames=False, return_tensors="pt")
    with torch.no_grad(), vlmprune.pruned(model, "evs", keep=0.4):
        output = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        (video,) = vlmprune.last_run(model).videos
    kept = [len(frame) for frame in video.kept_by_frame]
    answer = processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    print(f"{answer!r}; {len(video.kept)} of {video.total} tokens, by frame: {kept}")
    return kept


if __name__ == "__main__":
    main(*sys.argv[1:3])
