"""tiny-qwen2.5-vl-video: start weights, processor and export."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, Qwen2_5_VLForConditionalGeneration

from ..common.checkpoint import greedy_decoding, save_folder
from ..qwen.model import build_processor, qwen_config
from ..qwen.tokenizer import build_tokenizer
from .questions import WORDS

PICTURES = Path(__file__).parents[2] / "checkpoints" / "tiny-qwen2.5-vl"
FPS = 2
"""Frames of a clip in a second; with two frames a moment, a moment is a second."""
TIME_STEP = 1
"""Positions from one moment to the next (`tokens_per_second` at one second a moment)."""


@torch.no_grad()
def build_model() -> Qwen2_5_VLForConditionalGeneration:
    """The shipped tiny-qwen2.5-vl with the clips' words.

    Both frames of a slice have the mean of the two frames' patch weights, which leaves pictures as they are and makes a frame
    weigh as much as the other.
    """
    old, new = build_tokenizer(), build_tokenizer(WORDS)
    config = qwen_config(new)
    config.vision_config.tokens_per_second = TIME_STEP
    start = AutoModelForImageTextToText.from_pretrained(PICTURES, dtype=torch.float32)
    state = start.state_dict()
    name = next(key for key in state if key.endswith("embed_tokens.weight"))
    words = state[name]
    known = old.get_vocab()
    mean = words.mean(0)
    rows = [
        words[known[token]] if token in known else mean + 0.3 * words.std(0) * torch.randn(words.shape[1])
        for token in new.convert_ids_to_tokens(list(range(len(new))))
    ]
    state[name] = torch.stack(rows)
    if "lm_head.weight" in state:
        state["lm_head.weight"] = state[name]
    patch = next(key for key in state if key.endswith("patch_embed.proj.weight"))
    state[patch] = state[patch].mean(2, keepdim=True).expand_as(state[patch]).clone()
    model = Qwen2_5_VLForConditionalGeneration(config)
    model.load_state_dict(state)
    model.tie_weights()
    model.generation_config = greedy_decoding(new)
    return model.eval()


def export(model: Qwen2_5_VLForConditionalGeneration, folder: Path) -> None:
    """Write model (bf16), processor and tokenizer as an ordinary checkpoint folder."""
    save_folder(model, build_processor(WORDS), folder)
