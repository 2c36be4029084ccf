"""tiny-llava-next: the trained parts put together as an ordinary LLaVA-NeXT checkpoint with its processor."""

from __future__ import annotations

from pathlib import Path

from transformers import (
    CLIPVisionConfig,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessor,
    LlavaNextProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ..common.checkpoint import MEAN, STD, save_folder
from ..common.tokenizer import build_tokenizer
from ..llava.checkpoint import config_settings, fill, processor_settings
from ..llava.tower import tower_config
from .tiles import CELLS, PINPOINTS, TILE, Stitcher


def tile_tower_config() -> CLIPVisionConfig:
    """tiny-llava's tower for pictures of one tile."""
    config = tower_config()
    config.image_size = TILE
    return config


def llava_next_config(tokenizer: PreTrainedTokenizerFast) -> LlavaNextConfig:
    """Configuration of the whole model."""
    return LlavaNextConfig(
        vision_config=tile_tower_config(),
        image_grid_pinpoints=PINPOINTS,
        image_seq_length=CELLS**2,
        **config_settings(tokenizer),
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
    return LlavaNextProcessor(image_processor=images, **processor_settings(tokenizer))


def assemble(
    tower: CLIPVisionModel, projector: LlavaMultiModalProjector, language: LlamaForCausalLM, stitcher: Stitcher
) -> LlavaNextForConditionalGeneration:
    """The trained parts as one LLaVA-NeXT model in evaluation mode."""
    model = LlavaNextForConditionalGeneration(llava_next_config(build_tokenizer()))
    fill(model, tower, projector, language)
    model.model.image_newline.data.copy_(stitcher.newline.data)
    return model.eval()


def export(model: LlavaNextForConditionalGeneration, folder: Path) -> None:
    """Write model (bf16), processor and tokenizer as an ordinary checkpoint folder."""
    save_folder(model, build_processor(build_tokenizer()), folder)
    (folder / "model.safetensors").chmod(0o644)
