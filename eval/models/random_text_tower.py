"""A CLIP model with random weights that fits a preset's vision tower, for timing methods that score by its text tower."""

from __future__ import annotations

from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import CLIPConfig, CLIPModel, PreTrainedConfig, PreTrainedTokenizerFast
from transformers.initialization import no_init_weights

# The text tower of CLIP-L, from which LLaVA's vision tower comes.
TEXT = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "max_position_embeddings": 77,
    "vocab_size": 49408,
}
PROJECTION = 768


def random_text_tower(
    config: PreTrainedConfig, dtype: torch.dtype, device: torch.device
) -> tuple[CLIPModel, PreTrainedTokenizerFast] | None:
    """The pair for `text_tower`; None for models whose vision tower is not CLIP's.

    Of the vision tower, which nothing runs, there is one layer.
    """
    vision = config.vision_config
    if vision.model_type != "clip_vision_model":
        return None
    short = {**vision.to_dict(), "num_hidden_layers": 1}
    clip = CLIPConfig(text_config=TEXT, vision_config=short, projection_dim=PROJECTION)
    with no_init_weights(), torch.device(device):
        model: Any = CLIPModel(clip)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(float(name.endswith("weight")))
            else:
                parameter.copy_(0.02 * torch.randn(parameter.shape, generator=generator))
    return model.to(dtype).eval(), number_tokenizer(TEXT["vocab_size"])


def number_tokenizer(words: int) -> PreTrainedTokenizerFast:
    """A tokenizer that writes token `n` as the word "n"."""
    core = Tokenizer(models.WordLevel({str(number): number for number in range(words)}, unk_token="0"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="0")
