"""True architectures with random weights, so that latency needs no download."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from vlmprune.errors import unknown

from .loading import DTYPES, DeviceError, available_memory, pick_device, pick_dtype
from .made_up_request import default_image_processor

FOLDER = Path(__file__).parent / "presets"
BLOCK = 2**24


def preset_names() -> list[str]:
    """Names of the presets."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def preset_config(name: str) -> PreTrainedConfig:
    """The configuration of a preset; raises ``UnknownNameError`` if there is none of that name."""
    return AutoConfig.for_model(**_read(name)["config"])


def preset_image_processor(name: str) -> Any:
    """The image processor of a preset with the published settings; raises ``UnknownNameError`` as ``preset_config``."""
    return default_image_processor(preset_config(name), **_read(name)["image_processor"])


def preset_parameters(name: str) -> int:
    """The published number of parameters."""
    return int(_read(name)["parameters"])


def _read(name: str) -> dict[str, Any]:
    if name not in preset_names():
        raise unknown("preset", name, preset_names())
    content: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text(encoding="utf-8"))
    return content


def build_random(
    config: PreTrainedConfig, dtype: str = "bfloat16", device: str = "auto", seed: int = 0
) -> PreTrainedModel:
    """A model of that architecture with random weights; raises ``DeviceError`` before building one that cannot fit."""
    target, chosen = pick_device(device), pick_dtype(dtype)
    if isinstance(chosen, str):
        chosen = DTYPES["bfloat16"]
    with torch.device("meta"):
        empty = AutoModelForImageTextToText.from_config(config, dtype=chosen)
    needed = sum(p.numel() for p in empty.parameters()) * chosen.itemsize
    free = torch.cuda.mem_get_info(target)[0] if target.type == "cuda" else available_memory()
    if free is not None and needed > free:
        raise DeviceError(
            f"This model needs {needed / 2**30:.1f} GiB in {dtype} for its weights, {free / 2**30:.1f} GiB are free on {target}."
        )
    with no_init_weights(), torch.device(target):
        model = AutoModelForImageTextToText.from_config(config, dtype=chosen)
    generator = torch.Generator().manual_seed(seed)
    block = (0.02 * torch.randn(min(BLOCK, needed // chosen.itemsize), generator=generator)).to(target, chosen)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim < 2:
                parameter.fill_(float(name.endswith("weight")))
            else:
                for part in parameter.view(-1).split(len(block)):
                    part.copy_(block[: len(part)])
    return model.eval()
