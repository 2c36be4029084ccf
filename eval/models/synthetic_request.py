"""Requests of random pictures and random text for any supported model, made by the model type's own processor.

Only the tokenizer is a stand-in, so that the number of tiles and of visual tokens is what the processor makes of the picture's
size (resizing, tiles, rounding to patches), and no tokenizer has to be downloaded.
"""

from __future__ import annotations

import re
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from vlmprune.errors import ParameterError, unknown

DENSE_MARK, PACKED_MARK = "<image>", "<|vision_start|><|image_pad|><|vision_end|>"
KINDS = {
    "llava": ("LlavaProcessor", "CLIPImageProcessor", DENSE_MARK),
    "vipllava": ("LlavaProcessor", "CLIPImageProcessor", DENSE_MARK),
    "llava_next": ("LlavaNextProcessor", "LlavaNextImageProcessor", DENSE_MARK),
    "llava_onevision": ("LlavaOnevisionProcessor", "LlavaOnevisionImageProcessor", DENSE_MARK),
    "qwen2_vl": ("Qwen2VLProcessor", "Qwen2VLImageProcessor", PACKED_MARK),
    "qwen2_5_vl": ("Qwen2_5_VLProcessor", "Qwen2VLImageProcessor", PACKED_MARK),
    "qwen3_vl": ("Qwen3VLProcessor", "Qwen2VLImageProcessor", PACKED_MARK),
    "qwen3_vl_moe": ("Qwen3VLProcessor", "Qwen2VLImageProcessor", PACKED_MARK),
}
"""Processor, image processor and what stands for a picture in a prompt, by `config.model_type`."""
VIDEO_PROCESSORS = {
    "LlavaOnevisionProcessor": "LlavaOnevisionVideoProcessor",
    "Qwen2VLProcessor": "Qwen2VLVideoProcessor",
    "Qwen2_5_VLProcessor": "Qwen2VLVideoProcessor",
    "Qwen3VLProcessor": "Qwen3VLVideoProcessor",
}
WORD = "word"


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Picture sizes (width, height) from `"336,640x480"`; one number is a square.

    Raises `ParameterError` for anything else.
    """
    sizes = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", item.lower())
        if match is None:
            raise ParameterError(f"--image-size {item!r}; allowed: pixels like 336 or width x height like 640x480.")
        sizes.append((int(match[1]), int(match[2] or match[1])))
    if not sizes:
        raise ParameterError(f"--image-size {text!r} names no size; allowed: pixels like 336 or 640x480, by comma.")
    return list(dict.fromkeys(sizes))


def synthetic_request(
    config: PreTrainedConfig,
    image_size: tuple[int, int],
    text_tokens: int,
    batch_size: int = 1,
    image_processor: Any = None,
    seed: int = 0,
) -> dict[str, Tensor]:
    """Inputs of `batch_size` rows of one random picture of `image_size` (width, height) and `text_tokens` other tokens.

    `image_processor` is that of the checkpoint; by default one of the model type's class with the sizes of `config`. Raises
    `UnknownNameError` for a model type that is not supported and `ParameterError` for a prompt too short for its markers.
    """
    if config.model_type not in KINDS:
        raise unknown("model type", config.model_type, KINDS)
    processor_class, _, mark = KINDS[config.model_type]
    special = special_ids(config)
    words = text_tokens - (2 if mark == PACKED_MARK else 0)
    if words < 1:
        raise ParameterError(
            f"text_tokens={text_tokens}; allowed for {config.model_type!r}: {text_tokens - words + 1} or more."
        )
    tokenizer = stand_in_tokenizer(config)
    processor = _make_processor(processor_class, image_processor or default_image_processor(config), tokenizer, config)
    generator = np.random.default_rng(seed)
    width, height = image_size
    pictures = [
        Image.fromarray(generator.integers(0, 256, (height, width, 3), dtype=np.uint8)) for _ in range(batch_size)
    ]
    text = " ".join([WORD] * (words // 2) + [mark] + [WORD] * (words - words // 2))
    inputs = processor(images=[[picture] for picture in pictures], text=[text] * batch_size, return_tensors="pt")
    ids = inputs["input_ids"]
    vocabulary = min(config.get_text_config().vocab_size, 30000)
    usable = torch.tensor([token for token in range(vocabulary) if token not in special])
    picks = torch.from_numpy(generator.integers(0, len(usable), tuple(ids.shape)))
    word = tokenizer.convert_tokens_to_ids(WORD)
    inputs["input_ids"] = torch.where(ids == word, usable[picks], ids)
    return dict(inputs)


def default_image_processor(config: PreTrainedConfig, **settings: Any) -> Any:
    """The model type's image processor with the sizes of `config`; `settings` come on top."""
    name = KINDS[config.model_type][1]
    vision = config.vision_config
    if name == "Qwen2VLImageProcessor":
        given = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "size": {"shortest_edge": 4 * vision.patch_size**2 * 4, "longest_edge": 16384 * vision.patch_size**2 * 4},
        }
    elif name == "LlavaOnevisionImageProcessor":
        side = vision.image_size
        given = {"size": {"height": side, "width": side}, "image_grid_pinpoints": config.image_grid_pinpoints}
    else:
        side = vision.image_size
        given = {"size": {"shortest_edge": side}, "crop_size": {"height": side, "width": side}}
        if name == "LlavaNextImageProcessor":
            given["image_grid_pinpoints"] = config.image_grid_pinpoints
    return _processing_class(name)(**{**given, **settings})


def stand_in_tokenizer(config: PreTrainedConfig) -> PreTrainedTokenizerFast:
    """A tokenizer of one word that knows the model's markers by their true ids."""
    ids = {"<|vision_start|>": "vision_start_token_id", "<|vision_end|>": "vision_end_token_id"}
    packed = KINDS[config.model_type][2] == PACKED_MARK
    names = ("<|image_pad|>", "<|video_pad|>") if packed else ("<image>", "<video>")
    markers = {names[0]: config.image_token_id}
    video = getattr(config, "video_token_id", None)
    if video is not None:
        markers[names[1]] = video
    if packed:
        markers.update({mark: getattr(config, attribute) for mark, attribute in ids.items()})
    taken = {*markers.values()}
    word = next(token for token in range(len(taken) + 1) if token not in taken)
    core = Tokenizer(models.WordLevel({WORD: word, **markers}, unk_token=WORD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {"image_token": names[0], **({"video_token": names[1]} if video is not None else {})}
    if packed:
        named.update({"vision_bos_token": "<|vision_start|>", "vision_eos_token": "<|vision_end|>"})
    return PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token=WORD, pad_token=WORD, padding_side="left", extra_special_tokens=named
    )


def special_ids(config: PreTrainedConfig) -> set[int]:
    """Ids that mean something in `config` and its text part: placeholders, markers, begin, end, padding."""
    found: set[int] = set()
    for part in (config, config.get_text_config()):
        for name, value in part.to_dict().items():
            if name.endswith(("_token_id", "_token_index")):
                found.update(value if isinstance(value, (list, tuple)) else [value] if isinstance(value, int) else [])
    return found


def _make_processor(name: str, image_processor: Any, tokenizer: Any, config: PreTrainedConfig) -> Any:
    vision = config.vision_config
    strategy = getattr(config, "vision_feature_select_strategy", "default")
    settings: dict[str, Any] = {}
    if name in ("LlavaProcessor", "LlavaNextProcessor"):
        has_cls = vision.model_type.startswith("clip")
        settings = {
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(has_cls),
            "vision_feature_select_strategy": strategy,
        }
    elif name == "LlavaOnevisionProcessor":
        settings = {
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
            "vision_feature_select_strategy": strategy,
            "vision_aspect_ratio": config.vision_aspect_ratio,
        }
    if name in VIDEO_PROCESSORS:
        settings["video_processor"] = getattr(transformers, VIDEO_PROCESSORS[name])()
    return getattr(transformers, name)(image_processor=image_processor, tokenizer=tokenizer, **settings)


def _processing_class(name: str) -> Any:
    return getattr(transformers, name if is_torchvision_available() else f"{name}Pil")
