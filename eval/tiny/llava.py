"""tiny-llava: the trained parts put together as an ordinary LLaVA checkpoint with its processor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    CLIPImageProcessor,
    CLIPVisionModel,
    GenerationConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from .language import language_config
from .scenes import IMAGE_SIZE, PATCH_SIZE
from .tokenizer import IMAGE, build_tokenizer
from .tower import FEATURE_LAYER, tower_config

MEAN = STD = [0.5, 0.5, 0.5]


def llava_config(tokenizer: PreTrainedTokenizerFast) -> LlavaConfig:
    """Configuration of the whole model."""
    return LlavaConfig(
        vision_config=tower_config(),
        text_config=language_config(tokenizer),
        image_token_id=tokenizer.convert_tokens_to_ids(IMAGE),
        projector_hidden_act="gelu",
        vision_feature_select_strategy="default",
        vision_feature_layer=FEATURE_LAYER,
        image_seq_length=(IMAGE_SIZE // PATCH_SIZE) ** 2,
        tie_word_embeddings=True,
    )


def build_projector(tokenizer: PreTrainedTokenizerFast) -> LlavaMultiModalProjector:
    """LLaVA's own projector (two linear layers), untrained."""
    return LlavaMultiModalProjector(llava_config(tokenizer))


def build_processor(tokenizer: PreTrainedTokenizerFast) -> LlavaProcessor:
    """The processor: 192 px pictures, 576 places for each."""
    side = {"height": IMAGE_SIZE, "width": IMAGE_SIZE}
    images = CLIPImageProcessor(
        size={"shortest_edge": IMAGE_SIZE}, crop_size=side, image_mean=MEAN, image_std=STD, do_convert_rgb=True
    )
    return LlavaProcessor(
        image_processor=images,
        tokenizer=tokenizer,
        patch_size=PATCH_SIZE,
        vision_feature_select_strategy="default",
        chat_template=tokenizer.chat_template,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )


def assemble(
    tower: CLIPVisionModel, projector: LlavaMultiModalProjector, language: LlamaForCausalLM
) -> LlavaForConditionalGeneration:
    """The trained parts as one LLaVA model in evaluation mode."""
    tokenizer = build_tokenizer()
    model = LlavaForConditionalGeneration(llava_config(tokenizer))
    model.model.vision_tower.load_state_dict(tower.state_dict())
    model.model.multi_modal_projector.load_state_dict(projector.state_dict())
    model.model.language_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    model.generation_config = GenerationConfig(
        do_sample=False,
        max_new_tokens=16,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return model.eval()


def export(model: LlavaForConditionalGeneration, folder: Path) -> None:
    """Write model (bf16), processor and tokenizer as an ordinary checkpoint folder."""
    folder.mkdir(parents=True, exist_ok=True)
    build_processor(build_tokenizer()).save_pretrained(folder)
    copy = LlavaForConditionalGeneration(model.config)
    copy.load_state_dict(model.state_dict())
    copy.generation_config = model.generation_config
    copy.to(torch.bfloat16).save_pretrained(folder)
