"""tiny-llava: the trained parts put together as an ordinary LLaVA checkpoint with its processor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from ..common.checkpoint import MEAN, STD, greedy_decoding, save_folder
from ..common.language import language_config
from ..common.scenes import IMAGE_SIZE, PATCH_SIZE
from ..common.tokenizer import IMAGE, build_tokenizer
from .tower import FEATURE_LAYER, tower_config


def llava_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Configuration of the whole model."""
    return LlavaConfig(
        vision_config=tower_config(), image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2, **config_settings(tokenizer)
    )


def config_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the configurations of both LLaVAs say alike."""
    return {
        "text_config": language_config(tokenizer),
        "image_token_id": tokenizer.convert_tokens_to_ids(IMAGE),
        "projector_hidden_act": "gelu",
        "vision_feature_select_strategy": "default",
        "vision_feature_layer": FEATURE_LAYER,
        "tie_word_embeddings": True,
    }


def build_projector(tokenizer: PreTrainedTokenizerFast) -> LlavaMultiModalProjector:
    """LLaVA's own projector (two linear layers), untrained."""
    return LlavaMultiModalProjector(llava_config(tokenizer))


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: 192 px pictures, 576 places for each."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=MEAN, image_std=STD, do_convert_rgb=True
    )
    return LlavaProcessor(image_processor=images, **processor_settings(tokenizer))


def processor_settings(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    """What the processors of both LLaVAs say alike."""
    return {
        "tokenizer": tokenizer,
        "patch_size": PATCH_SIZE,
        "vision_feature_select_strategy": "default",
        "chat_template": tokenizer.chat_template,
        "image_token": IMAGE,
        "num_additional_image_tokens": 1,
    }


def assemble(
    tower: CLIPVisionModel, projector: LlavaMultiModalProjector, language: LlamaForCausalLM
) -> LlavaForConditionalGeneration:
    """The trained parts as one LLaVA model in evaluation mode."""
    model = LlavaForConditionalGeneration(llava_config(build_tokenizer()))
    fill(model, tower, projector, language)
    return model.eval()


def fill(
    model: PreTrainedModel, tower: CLIPVisionModel, projector: LlavaMultiModalProjector, language: LlamaForCausalLM
) -> None:
    """Put the trained parts into a LLaVA or LLaVA-NeXT model, which then decodes greedily."""
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = greedy_decoding(build_tokenizer())


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model (bf16), processor and tokenizer as an ordinary checkpoint folder."""
    save_folder(model, build_processor(build_tokenizer()), folder)
