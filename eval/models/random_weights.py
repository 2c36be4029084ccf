"""True architectures with random weights, so that latency needs no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vlmprune.errors import unknown

from .loading import pick_device, pick_dtype
from .memory import require_memory
from .synthetic_request import default_image_processor

FOLDER = Path(__file__).parent / "presets"
BLOCK = 2**24


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def preset_config(name: str) -> PreTrainedConfig:
    """The configuration of a preset.

    Raises:
        UnknownNameError: there is none of that name.
    """
    return AutoConfig.for_model(**_read(name)["config"])


def preset_image_processor(name: str) -> Any:
    """The image processor of a preset with the published settings.

    Raises:
        UnknownNameError: there is no preset of that name.
    """
    return default_image_processor(preset_config(name), **_read(name)["image_processor"])


def preset_parameters(name: str) -> int:
    """The published number of parameters."""
    return int(_read(name)["parameters"])


def _read(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def open_preset(
    name: str,
    dtype: str,
    device: str,
    batch_size: int,
    image_size: tuple[int, int],
    text_tokens: int,
    video_frames: int = 0,
) -> tuple[PreTrainedModel, Any]:
    """A preset with random weights and its image processor.

    Args:
        name: the preset.
        dtype: "auto" is bfloat16.
        device: "auto" takes a GPU where there is one.
        batch_size: requests that it will be asked at once.
        image_size: width and height of their pictures.
        text_tokens: their text tokens.
        video_frames: frames of that size of a video in the picture's place.

    Raises:
        UnknownNameError: there is no preset of that name.
        DeviceError: model and requests do not fit; before anything large is made.
    """
    config = preset_config(name)
    need = batch_size, image_size, text_tokens
    require_memory(name, config, random_dtype(dtype), pick_device(device), *need, video_frames=video_frames)
    return build_random(config, dtype, device), preset_image_processor(name)


def build_random(
    config: PreTrainedConfig, dtype: str = "bfloat16", device: str = "auto", seed: int = 0
) -> PreTrainedModel:
    """A model of that architecture in evaluation mode, its matrices filled from one block of random numbers.

    The caller makes sure that it fits (see `require_memory`).
    """
    target, chosen = pick_device(device), random_dtype(dtype)
    with no_init_weights(), torch.device(target):
        model = AutoModelForImageTextToText.from_config(config, dtype=chosen)
    model.tie_weights()
    generator = torch.Generator().manual_seed(seed)
    block = (0.02 * torch.randn(BLOCK, generator=generator)).to(target, chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(float(name.endswith("weight")))
            else:
                for part in parameter.view(-1).split(len(block)):
                    part.copy_(block[: len(part)])
    return model.eval()


def random_dtype(name: str) -> torch.dtype:
    """The dtype of that name; "auto" is bfloat16, as nearly all checkpoints are."""
    chosen = pick_dtype(name)
    return torch.bfloat16 if isinstance(chosen, str) else chosen
