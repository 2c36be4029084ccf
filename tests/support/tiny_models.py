"""Tiny random models built from configs, and prompts for them; no downloads."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2Config,
    SiglipVisionConfig,
)

VOCABULARY = 120
IMAGE_TOKEN = 119
PAD = 0

# A row of a batch: an int stands for that many text tokens, a string for the image of that name.
Row = Sequence[int | str]


@dataclass(frozen=True)
class FamilyCase:
    """One tiny model and how prompts for it are made.

    Attributes:
        build: makes the model of a dtype; cached, so tests must undo what they apply.
        image: makes the processor's tensors of a named image, batch dimension first.
        tokens: placeholders of a named image.
        images_or_videos: whether a call has no images where it has videos.
    """

    images_or_videos: ClassVar[bool] = False

    name: str
    build: Callable[[torch.dtype], Any]
    image: Callable[[str], dict[str, Tensor]]
    tokens: Callable[[str], int]

    def __repr__(self) -> str:
        return self.name

    def inputs(
        self, rows: Sequence[Row], padding: str = "left", dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the model inputs of a padded batch."""
        ids = [self._ids(row) for row in rows]
        width = max(map(len, ids))
        padded, mask = [], []
        for row in ids:
            fill, ones = [PAD] * (width - len(row)), [1] * len(row)
            zeros = [0] * len(fill)
            padded.append(fill + row if padding == "left" else row + fill)
            mask.append(zeros + ones if padding == "left" else ones + zeros)
        images = [self.image(item) for row in rows for item in row if isinstance(item, str)]
        tensors = {key: torch.cat([image[key] for image in images]) for key in (images[0] if images else {})}
        tensors = {key: value.to(dtype) if value.is_floating_point() else value for key, value in tensors.items()}
        return {"input_ids": torch.tensor(padded), "attention_mask": torch.tensor(mask), **tensors}

    def longer(self, model: Any, turns: Sequence[dict[str, Tensor]], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return `generate` inputs for `ids` and `mask`, which hold the prompts of `turns` and what was said between them.

        The pixels are those of the last turn; the images before it are in the cache.
        """
        images = {key: value for key, value in turns[-1].items() if key not in ("input_ids", "attention_mask")}
        return {"input_ids": ids, "attention_mask": mask, **images}

    def positions(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return position ids `[..., batch, tokens]` of a prompt, as `generate` makes them."""
        return (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)

    def _ids(self, row: Row) -> list[int]:
        ids: list[int] = []
        for item in row:
            if isinstance(item, str):
                ids += [IMAGE_TOKEN] * self.tokens(item)
            else:
                generator = torch.Generator().manual_seed(1000 + 31 * len(ids) + item)
                ids += torch.randint(1, IMAGE_TOKEN - 10, (item,), generator=generator).tolist()
        return ids


def seeded_pixels(name: str, *shape: int) -> Tensor:
    """Return pixels `[1, *shape]` that depend on the name only."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(1, *shape, generator=generator)


def spread_weights(model: Any) -> Any:
    """Widen the random weights, so that attention and greedy choices are far from ties."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                scale = 0.5 if "embed" in name else 1.6 / parameter.shape[-1] ** 0.5
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * scale)
            elif not any(part in name for part in ("norm", "ln_", "bias")):
                # Class embeddings and newlines, which the host draws from the global generator.
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.5)
    return model


LLAMA_GQA = LlamaConfig(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=512,
    pad_token_id=PAD,
    eos_token_id=None,
    bos_token_id=1,
)
QWEN_TIED = Qwen2Config(
    vocab_size=VOCABULARY,
    hidden_size=32,
    intermediate_size=48,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=4,
    max_position_embeddings=512,
    tie_word_embeddings=True,
    pad_token_id=PAD,
    eos_token_id=None,
    bos_token_id=1,
)
TOWER = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
CLIP = CLIPVisionConfig(**TOWER, image_size=24, patch_size=4, projection_dim=32)
SIGLIP = SiglipVisionConfig(**TOWER, image_size=20, patch_size=4, vision_use_head=False)


def _llava(text: Any, vision: Any) -> Callable[[torch.dtype], Any]:
    @lru_cache(maxsize=4)
    def build(dtype: torch.dtype) -> Any:
        config = LlavaConfig(
            vision_config=vision.to_dict(),
            text_config=text.to_dict(),
            image_token_index=IMAGE_TOKEN,
            image_seq_length=(vision.image_size // vision.patch_size) ** 2,
            vision_feature_select_strategy="default" if vision.model_type == "clip_vision_model" else "full",
            tie_word_embeddings=text.tie_word_embeddings,
        )
        model = spread_weights(LlavaForConditionalGeneration(config)).to(dtype).eval()
        model.generation_config.pad_token_id = PAD
        model.generation_config.suppress_tokens = [IMAGE_TOKEN]
        return model

    return build


def llava_case(name: str, text: Any = LLAMA_GQA, vision: Any = CLIP) -> FamilyCase:
    """Return a LLaVA-1.5 case with the given language model and tower."""
    side = vision.image_size
    return FamilyCase(
        name,
        _llava(text, vision),
        lambda image: {"pixel_values": seeded_pixels(image, 3, side, side)},
        lambda image: (side // vision.patch_size) ** 2,
    )


LLAVA_CLIP_GQA = llava_case("llava-clip-gqa")
LLAVA_SIGLIP_TIED = llava_case("llava-siglip-tied", QWEN_TIED, SIGLIP)
