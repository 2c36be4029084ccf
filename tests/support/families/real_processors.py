"""The hosts' own processors with a small tokenizer, photographs and clips for them; no downloads."""

from __future__ import annotations

import copy
from functools import lru_cache
from typing import Any

import numpy as np
import torch
import transformers
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from support.families import gemma3, gemma4, glm4v, idefics3, internvl, pixtral
from support.families.anyres_case import PATCH, TILE
from support.families.gemma_case import BEGIN, END
from support.families.llava_next import PINPOINTS as NEXT_PINPOINTS
from support.families.llava_onevision import PINPOINTS
from support.families.llava_onevision import VIDEO_TOKEN as ONEVISION_VIDEO
from support.families.qwen_case import VIDEO_TOKEN, VISION_END, VISION_START
from support.tiny_models import CLIP, IMAGE_TOKEN, PAD, FamilyCase, spread_weights

_WORDS = (
    "what", "is", "shown", "here", "?", "describe", "the", "picture", "and", "clip", ".", "yes", "no", "a",
    "seconds", "<", ">", "0", "1", "2", "3", "4", "5", "6", "7", "8", "9",
)  # fmt: skip
# Even numbers of patches a side: the processor counts a quarter of a frame's patches.
NEXT_VIDEO_PATCH = 5
QWEN_PATCH = {"Qwen2VLProcessor": 14, "Qwen2_5_VLProcessor": 14, "Qwen3VLProcessor": 16}
_QWEN_VIDEO = {"Qwen3VLProcessor": "Qwen3VLVideoProcessor"}


def _tokenizer(special: dict[str, int], **named: str) -> PreTrainedTokenizerFast:
    words = {"<pad>": PAD, "<unk>": 1, **{word: 2 + index for index, word in enumerate(_WORDS)}, **special}
    core = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Whitespace(), pre_tokenizers.Digits(True)])
    core.add_special_tokens([AddedToken(token, normalized=False) for token in special])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", unk_token="<unk>", padding_side="left", extra_special_tokens=named
    )


def llava_processor() -> Any:
    """Return the LLaVA-1.5 processor for the tiny model with a CLIP tower."""
    side = CLIP.image_size
    return transformers.LlavaProcessor(
        transformers.CLIPImageProcessor(size={"shortest_edge": side}, crop_size={"height": side, "width": side}),
        _tokenizer({"<image>": IMAGE_TOKEN}),
        patch_size=CLIP.patch_size,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def qwen_processor(name: str) -> Any:
    """Return a Qwen-VL processor for pictures and frames of at most about 160 x 160 pixels."""
    tokens = {"<|image_pad|>": IMAGE_TOKEN, "<|video_pad|>": VIDEO_TOKEN}
    tokens |= {"<|vision_start|>": VISION_START, "<|vision_end|>": VISION_END}
    sizes = {"patch_size": QWEN_PATCH[name], "merge_size": 2, "temporal_patch_size": 2}
    image_processor = transformers.Qwen2VLImageProcessor(
        **sizes, size={"shortest_edge": 56 * 56, "longest_edge": 160 * 160}
    )
    # The video processor of Qwen3-VL counts the pixels of all frames, those of Qwen2-VL of one.
    longest = 8 * 112 * 112 if name == "Qwen3VLProcessor" else 112 * 112
    video_processor = getattr(transformers, _QWEN_VIDEO.get(name, "Qwen2VLVideoProcessor"))(
        **sizes, size={"shortest_edge": 56 * 56, "longest_edge": longest}, do_sample_frames=False
    )
    return getattr(transformers, name)(image_processor, _tokenizer(tokens), video_processor)


def onevision_processor() -> Any:
    """Return the OneVision processor for the tiles of the tiny model."""
    square = {"height": TILE, "width": TILE}
    return transformers.LlavaOnevisionProcessor(
        transformers.LlavaOnevisionImageProcessor(size=square, image_grid_pinpoints=PINPOINTS),
        _tokenizer({"<image>": IMAGE_TOKEN, "<video>": ONEVISION_VIDEO}),
        transformers.LlavaOnevisionVideoProcessor(size=square),
        num_image_tokens=(TILE // PATCH) ** 2,
        vision_feature_select_strategy="full",
        vision_aspect_ratio="anyres_max_2",
    )


def next_video_processor() -> Any:
    """Return the LLaVA-NeXT-Video processor for the tiny model with patches of `NEXT_VIDEO_PATCH` pixels."""
    square = {"height": TILE, "width": TILE}
    return transformers.LlavaNextVideoProcessor(
        video_processor=transformers.LlavaNextVideoVideoProcessor(size=square, crop_size=square),
        image_processor=transformers.LlavaNextImageProcessor(
            size={"shortest_edge": TILE}, crop_size=square, image_grid_pinpoints=NEXT_PINPOINTS
        ),
        tokenizer=_tokenizer({"<image>": IMAGE_TOKEN, "<video>": ONEVISION_VIDEO}),
        patch_size=NEXT_VIDEO_PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
    )


def gemma3_processor() -> Any:
    """Return the Gemma 3 processor for the tiles of the tiny model."""
    special = {"<start_of_image>": BEGIN, "<image_soft_token>": IMAGE_TOKEN, "<end_of_image>": END}
    named = {"boi_token": "<start_of_image>", "image_token": "<image_soft_token>", "eoi_token": "<end_of_image>"}
    square = {"height": gemma3.SIDE, "width": gemma3.SIDE}
    return transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size=square), _tokenizer(special, **named), image_seq_length=gemma3.TOKENS
    )


def gemma4_processor() -> Any:
    """Return the Gemma 4 processor for pictures and frames of at most 70 visual tokens of the tiny model."""
    special = {"<|image>": BEGIN, "<|image|>": IMAGE_TOKEN, "<image|>": END, "<|video|>": gemma4.VIDEO_TOKEN}
    special |= {"<|audio|>": gemma4.AUDIO_TOKEN, "<|audio>": 114, "<audio|>": 113}
    named = {"boi_token": "<|image>", "image_token": "<|image|>", "eoi_token": "<image|>", "audio_token": "<|audio|>"}
    named |= {"boa_token": "<|audio>", "eoa_token": "<audio|>"}
    sizes = {"patch_size": gemma4.PATCH, "pooling_kernel_size": gemma4.CELL, "max_soft_tokens": 70}
    return transformers.Gemma4Processor(
        transformers.Gemma4AudioFeatureExtractor(),
        transformers.Gemma4ImageProcessor(**sizes),
        _tokenizer(special, **named),
        transformers.Gemma4VideoProcessor(**sizes, do_sample_frames=False),
    )


def internvl_processor() -> Any:
    """Return the InternVL processor for the tiles of the tiny model."""
    named = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    special = {"<IMG_CONTEXT>": IMAGE_TOKEN, "<img>": VISION_START, "</img>": VISION_END, "<video>": VIDEO_TOKEN}
    side = internvl.SIDE
    size = {"height": side, "width": side}
    return transformers.InternVLProcessor(
        transformers.GotOcr2ImageProcessor(size=size, crop_to_patches=True, min_patches=1, max_patches=4),
        _tokenizer(special, **named),
        transformers.InternVLVideoProcessor(size=size),
        image_seq_length=25,
    )


def idefics3_processor(case: FamilyCase) -> Any:
    """Return the Idefics3 or SmolVLM processor for the tiles of the tiny model."""
    side = case.build(torch.float32).config.vision_config.image_size
    special = {"<image>": IMAGE_TOKEN, "<fake_token_around_image>": idefics3.FAKE, "<end_of_utterance>": 112}
    sizes = {"size": {"longest_edge": 2 * side}, "max_image_size": {"longest_edge": side}}
    tokenizer = _tokenizer({**special, "<global-img>": 111})
    if case is idefics3.IDEFICS3:
        return transformers.Idefics3Processor(transformers.Idefics3ImageProcessor(**sizes), tokenizer, image_seq_len=25)
    return transformers.SmolVLMProcessor(
        transformers.SmolVLMImageProcessor(**sizes),
        tokenizer,
        transformers.SmolVLMVideoProcessor(**sizes),
        image_seq_len=25,
    )


def glm4v_processor(name: str) -> Any:
    """Return a GLM-4V processor, of class `name` + "Processor", for patches of the tiny model."""
    special = {
        "<|image|>": IMAGE_TOKEN,
        "<|video|>": VIDEO_TOKEN,
        "<|begin_of_image|>": VISION_START,
        "<|end_of_image|>": VISION_END,
        "<|begin_of_video|>": glm4v.VIDEO_START,
        "<|end_of_video|>": glm4v.VIDEO_END,
    }
    # Pixels of two frames count.
    sizes = {"patch_size": 2, "merge_size": 2, "size": {"shortest_edge": 2 * 8 * 8, "longest_edge": 2 * 32 * 32}}
    return getattr(transformers, f"{name}Processor")(
        getattr(transformers, f"{name}ImageProcessor")(**sizes),
        _tokenizer(special, **{"image_token": "<|image|>", "video_token": "<|video|>"}),
        getattr(transformers, f"{name}VideoProcessor")(**sizes),
    )


def pixtral_processor(side: int) -> Any:
    """Return the Pixtral processor for the tiny models, whose visual tokens are of `side` x `side` patches."""
    special = {"[IMG]": IMAGE_TOKEN, "[IMG_BREAK]": pixtral.BREAK, "[IMG_END]": pixtral.END}
    return transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 32 * side}, patch_size={"height": 4, "width": 4}),
        _tokenizer(special),
        patch_size=pixtral.PATCH,
        spatial_merge_size=side,
    )


def paddleocr_processor() -> Any:
    """Return the PaddleOCR-VL processor for patches of the tiny model."""
    special = {"<|IMAGE_PLACEHOLDER|>": IMAGE_TOKEN, "<|IMAGE_START|>": VISION_START, "<|IMAGE_END|>": VISION_END}
    return transformers.PaddleOCRVLProcessor(
        transformers.PaddleOCRVLImageProcessor(patch_size=2, merge_size=2, min_pixels=8 * 8, max_pixels=32 * 32),
        _tokenizer(special, **{"image_token": "<|IMAGE_PLACEHOLDER|>"}),
    )


def photograph(name: str) -> np.ndarray:
    """Return a photograph of scikit-image, uint8 `[height, width, 3]`."""
    from skimage import data

    return np.asarray(getattr(data, name)())


def clip(name: str, frames: int, height: int = 120, width: int = 160) -> np.ndarray:
    """Return a pan over a photograph, uint8 `[frames, height, width, 3]`."""
    picture = photograph(name)
    return np.stack([picture[12 * frame :, 20 * frame :][:height, :width] for frame in range(frames)])


@lru_cache(maxsize=8)
def with_patches(case: FamilyCase, patch_size: int) -> Any:
    """Return the tiny model of a case with the patch size of the published models."""
    shallow = case.build(torch.float32)
    config = copy.deepcopy(shallow.config)
    vision = config.vision_config
    if hasattr(vision, "window_size"):
        vision.window_size = vision.window_size * patch_size // vision.patch_size
    vision.patch_size = patch_size
    model = spread_weights(type(shallow)(config)).eval()
    with torch.no_grad():
        model.lm_head.weight[VIDEO_TOKEN] = 0
    model.generation_config = copy.deepcopy(shallow.generation_config)
    return model
