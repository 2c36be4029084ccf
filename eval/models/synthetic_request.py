"""Requests of random pictures and random text for any supported model, made by the model type's own processor.

Only the tokenizer is a stand-in, so that the number of tiles and of visual tokens is what the processor makes of the picture's
size (resizing, tiles, rounding to patches), and no tokenizer has to be downloaded.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
import transformers
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from vlmprune.errors import ParameterError, UnsupportedCallError
from vlmprune.patches.families.facts import has_cls
from vlmprune.patches.families.family import Family
from vlmprune.patches.families.registry import family_of_config

WORD = "word"


def parse_sizes(text: str) -> list[tuple[int, int]]:
    """Picture sizes (width, height) from `"336,640x480"`; one number is a square.

    Raises:
        ParameterError: it is anything else.
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
    video_frames: int = 0,
) -> dict[str, Tensor]:
    """Inputs of rows of one random picture, or one random video, and random text each.

    Args:
        config: the model's configuration.
        image_size: width and height of the picture.
        text_tokens: tokens of a row that are not the picture's.
        batch_size: number of rows.
        image_processor: that of the checkpoint; by default one of the family's class with the sizes of `config`.
        seed: of pictures and text.
        video_frames: frames of `image_size` of a video that takes the picture's place; 0 is a picture.

    Raises:
        UnknownNameError: the model type is not supported.
        UnsupportedCallError: it takes no videos.
        ParameterError: the prompt is too short for its markers.
    """
    preparation = family_of_config(config).preparation
    if video_frames and preparation.video is None:
        raise UnsupportedCallError(f"Models of type {config.model_type!r} take no videos; --video-frames 0 is allowed.")
    mark = (preparation.video if video_frames else preparation.picture) or ""
    special = special_ids(config)
    words = text_tokens - (sum(marker in mark for marker in preparation.markers) - 1)
    if words < 1:
        raise ParameterError(
            f"text_tokens={text_tokens}; allowed for {config.model_type!r}: {text_tokens - words + 1} or more."
        )
    tokenizer = stand_in_tokenizer(config)
    processor = make_processor(image_processor or default_image_processor(config), tokenizer, config)
    generator = np.random.default_rng(seed)
    width, height = image_size
    shape = (batch_size, video_frames or 1, height, width, 3)
    pixels = generator.integers(0, 256, shape, dtype=np.uint8)
    seen: dict[str, Any] = (
        {
            "videos": list(pixels),
            "video_metadata": [_metadata(video_frames)] * batch_size,
            "do_sample_frames": False,
        }
        if video_frames
        else {"images": [[Image.fromarray(picture)] for picture in pixels[:, 0]]}
    )
    text = " ".join([WORD] * (words // 2) + [mark] + [WORD] * (words - words // 2))
    inputs = processor(**seen, text=[text] * batch_size, return_tensors="pt")
    ids = inputs["input_ids"]
    vocabulary = min(config.get_text_config().vocab_size, 30000)
    usable = torch.tensor([token for token in range(vocabulary) if token not in special])
    picks = torch.from_numpy(generator.integers(0, len(usable), tuple(ids.shape)))
    word = tokenizer.convert_tokens_to_ids(WORD)
    inputs["input_ids"] = torch.where(ids == word, usable[picks], ids)
    return dict(inputs)


def _metadata(frames: int) -> dict[str, Any]:
    """Of a video of two frames in a second that are all used."""
    return {
        "fps": 2.0, "total_num_frames": frames, "duration": frames / 2, "frames_indices": list(range(frames)),
    }  # fmt: skip


def for_model(request: Mapping[str, Tensor], model: PreTrainedModel) -> dict[str, Tensor]:
    """The inputs where the model is, pixels in its dtype."""
    return {
        key: value.to(model.device, model.dtype if value.is_floating_point() else value.dtype)
        for key, value in request.items()
    }


def default_image_processor(config: PreTrainedConfig, **settings: Any) -> Any:
    """The model type's image processor with the sizes of `config`; `settings` come on top."""
    family, vision = family_of_config(config), config.vision_config
    name = family.preparation.image_processor
    if family.tower_kind == "packed":
        given = {
            "patch_size": vision.patch_size,
            "merge_size": vision.spatial_merge_size,
            "temporal_patch_size": vision.temporal_patch_size,
            "size": {"shortest_edge": 4 * vision.patch_size**2 * 4, "longest_edge": 16384 * vision.patch_size**2 * 4},
        }
    else:
        given = _square_sizes(family, vision.image_size)
        if family.has_tiles:
            given["image_grid_pinpoints"] = config.image_grid_pinpoints
    return _processing_class(name)(**{**given, **settings})


def _square_sizes(family: type[Family], side: int) -> dict[str, Any]:
    """Settings of a processor that makes every picture a square of `side` pixels: resized, or resized and cropped."""
    square = {"height": side, "width": side}
    if family.picture_kind == "tiles of single pictures":
        return {"size": square}
    return {"size": {"shortest_edge": side}, "crop_size": square}


def default_video_processor(config: PreTrainedConfig) -> Any:
    """The model type's video processor with the sizes of `config`."""
    family, vision = family_of_config(config), config.vision_config
    made = getattr(transformers, str(family.preparation.video_processor))
    if family.tower_kind != "packed":
        return made(**_square_sizes(family, vision.image_size))
    pixels = vision.patch_size**2 * vision.spatial_merge_size**2
    # Of Qwen3-VL the limits are those of all frames together, of the others those of one.
    return made(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size={"shortest_edge": 4 * pixels, "longest_edge": 2**17 * pixels},
    )


def stand_in_tokenizer(config: PreTrainedConfig, every_id: bool = False) -> PreTrainedTokenizerFast:
    """A tokenizer of one word that knows the model's markers by their true ids.

    With `every_id` all other ids are words too, so that whatever the model says has a text.
    """
    known = {
        marker: (getattr(config, attribute), name)
        for marker, (attribute, name) in family_of_config(config).preparation.markers.items()
        if getattr(config, attribute, None) is not None
    }
    markers = {marker: number for marker, (number, _) in known.items()}
    taken = set(markers.values())
    word = next(token for token in range(len(taken) + 1) if token not in taken)
    others = set(range(config.get_text_config().vocab_size)) - taken - {word} if every_id else ()
    vocabulary = {WORD: word, **markers, **{f"{WORD}{token}": token for token in others}}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=WORD))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    named = {name: marker for marker, (_, name) in known.items()}
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


def make_processor(image_processor: Any, tokenizer: Any, config: PreTrainedConfig) -> Any:
    """The model type's processor of these two, with the sizes of `config`."""
    preparation, vision = family_of_config(config).preparation, config.vision_config
    made = getattr(transformers, preparation.processor)
    settings: dict[str, Any] = {"image_processor": image_processor, "tokenizer": tokenizer}
    if preparation.video_processor is not None:
        settings["video_processor"] = default_video_processor(config)
    if hasattr(vision, "image_size"):
        settings |= {
            "patch_size": vision.patch_size,
            "num_additional_image_tokens": int(has_cls(config)),
            "num_image_tokens": (vision.image_size // vision.patch_size) ** 2,
            "vision_feature_select_strategy": getattr(config, "vision_feature_select_strategy", "default"),
            "vision_aspect_ratio": getattr(config, "vision_aspect_ratio", None),
        }
    taken = inspect.signature(made.__init__).parameters
    return made(**{name: value for name, value in settings.items() if name in taken})


def _processing_class(name: str) -> Any:
    return getattr(transformers, name if is_torchvision_available() else f"{name}Pil")
