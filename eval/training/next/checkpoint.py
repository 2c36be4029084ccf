"""tiny-llava-next: the trained parts put together as an ordinary LLaVA-NeXT checkpoint with its processor."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)

from ..common.checkpoint import MEAN, STD, save_folder
from ..common.language import language_config
from ..common.scenes import PATCH_SIZE
from ..common.tokenizer import IMAGE, build_tokenizer
from ..llava.checkpoint import fill
from ..llava.tower import FEATURE_LAYER
from .stages import Workshop, tile_tower_config
from .tiles import CELLS, PINPOINTS, TILE


def llava_next_config(tokenizer: PreTrainedTokenizerFast) -> LlavaNextConfig:
    """Configuration of the whole model."""
    return LlavaNextConfig(
        vision_config=tile_tower_config(),
        text_config=language_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=FEATURE_LAYER,
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=CELLS**2,
        tie_word_embeddings=True,
    )


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaNextProcessor:
    """The processor: tiles of 96 px, 144 places for each, and a newline after every row of the crops."""
    images = LlavaNextImageProcessor(
        size={"shortest_edge": TILE},
        crop_size={"height": TILE, "width": TILE},
        image_grid_pinpoints=PINPOINTS,
        image_mean=MEAN,
        image_std=STD,
        do_convert_rgb=True,
    )
    return LlavaNextProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def assemble(shop: Workshop) -> LlavaNextForConditionalGeneration:
    """The trained parts as one LLaVA-NeXT model in evaluation mode."""
    model = LlavaNextForConditionalGeneration(llava_next_config(build_tokenizer()))
    fill(model, shop.tower, shop.projector, shop.language)
    model.model.image_newline.data.copy_(shop.stitcher.newline.data)
    return model.eval()


def export(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Write model (bf16), processor and tokenizer as an ordinary checkpoint folder."""
    save_folder(model, build_processor(build_tokenizer()), folder)
    (folder / "model.safetensors").chmod(0o644)
