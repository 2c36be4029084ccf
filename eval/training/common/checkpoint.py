"""What the tiny models' checkpoint folders have in common: bf16 weights, the processor's files, greedy decoding."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, ProcessorMixin

MEAN = STD = [0.5, 0.5, 0.5]


def greedy_decoding(tokenizer: PreTrainedTokenizerFast) -> GenerationConfig:
    """Greedy decoding of at most 16 tokens."""
    return GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def save_folder(model: PreTrainedModel, processor: ProcessorMixin, folder: Path) -> None:
    """Write model (bf16), processor and tokenizer as an ordinary checkpoint folder; `model` itself stays as it is."""
    folder.mkdir(parents=True, exist_ok=True)
    processor.save_pretrained(folder)
    copy = type(model)(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
