"""A real CLIP model around a frozen vision tower: its configuration, tokenizer and folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import processors
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, PreTrainedTokenizerFast

from ..common.tokenizer import BOS, build_tokenizer

END = "<|endoftext|>"
PLACES = 32
"""Tokens that the text tower takes at once (CLIP's takes 77)."""
WIDTH = 64


def clip_tokenizer() -> PreTrainedTokenizerFast:
    """The tiny models' tokenizer as CLIP's is: the end has the highest id, stands behind every text and fills up."""
    tokenizer = build_tokenizer()
    tokenizer.add_special_tokens({"eos_token": END, "pad_token": END})
    begin, end = (tokenizer.convert_tokens_to_ids(mark) for mark in (BOS, END))
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A {END}", special_tokens=[(BOS, begin), (END, end)]
    )
    tokenizer.chat_template = None
    tokenizer.padding_side = "right"
    tokenizer.model_max_length = PLACES
    return tokenizer


def clip_model(tower: Any, vision: CLIPVisionConfig, tokenizer: PreTrainedTokenizerFast) -> CLIPModel:
    """A CLIP model with `tower`'s weights, frozen, and an untrained text tower of two layers and both projections."""
    text = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=PLACES,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=WIDTH))
    weights = {name.removeprefix("vision_model."): value for name, value in tower.state_dict().items()}
    model.vision_model.load_state_dict(weights)
    model.vision_model.requires_grad_(False)
    return model


def text_ids(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    """Token ids int64 `[texts, longest]`, filled up with the end."""
    encoded: torch.Tensor = tokenizer(texts, padding=True, return_tensors="pt").input_ids
    return encoded


def export_pair(model: CLIPModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Write both as an ordinary CLIP folder, weights in bf16."""
    folder.mkdir(parents=True, exist_ok=True)
    copy = CLIPModel(model.config)
    copy.load_state_dict(model.state_dict())
    copy.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
