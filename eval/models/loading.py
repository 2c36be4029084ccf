"""Loading a vision-language model and its processor for evaluation."""

from __future__ import annotations

import hashlib
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, PreTrainedModel

from vlmprune.errors import unknown
from vlmprune.patches.families.registry import family_of_config

from .memory import TYPICAL_IMAGE, DeviceError, require_memory, stored_bytes
from .names import ModelLoadError, resolve_model

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
SHORT_DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}


@dataclass(frozen=True)
class LoadedModel:
    """A model in evaluation mode with its processor; `source` is the folder or hub name it came from."""

    model: PreTrainedModel
    processor: Any
    source: str

    def describe(self) -> dict[str, Any]:
        """What a result depends on: weights, dtype, attention implementation and processor settings."""
        config = self.model.config
        image = getattr(self.processor, "image_processor", None)
        settings = image.to_dict() if image is not None else {}
        return {
            "source": self.source,
            "fingerprint": fingerprint(self.source),
            "model_type": config.model_type,
            "text_model_type": config.get_text_config().model_type,
            "parameters": sum(p.numel() for p in self.model.parameters()),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": self.model.device.type,
            "attention": getattr(config, "_attn_implementation", None),
            "image_processor": {
                k: v for k, v in sorted(settings.items()) if isinstance(v, (str, int, float, dict, list))
            },
        }


def load_model(
    name: str,
    dtype: str = "auto",
    device: str = "auto",
    batch_size: int = 1,
    image_size: tuple[int, int] = TYPICAL_IMAGE,
    video_frames: int = 0,
) -> LoadedModel:
    """Load the model that `name` means (see `resolve_model`) with its processor.

    Args:
        name: a shipped name, a folder or a hub name.
        dtype: "auto" takes what the checkpoint stores.
        device: "auto" takes a GPU where there is one.
        batch_size: prompts that it will be asked at once.
        image_size: width and height of the pictures that it will be asked about.
        video_frames: frames of that size of the videos that it will be asked about instead; 0: pictures.

    Raises:
        ModelLoadError: something about the folder or hub name is wrong.
        DeviceError: model and requests cannot fit; before the weights are read.
    """
    target = pick_device(device)
    wanted = pick_dtype(dtype)
    source = resolve_model(name)
    try:
        config = AutoConfig.from_pretrained(source)
    except Exception as error:
        raise ModelLoadError(_load_message(source, error)) from error
    family_of_config(config)
    known = wanted if isinstance(wanted, torch.dtype) else None
    stored = config.dtype or config.get_text_config().dtype or torch.float32
    weights = None if known else stored_bytes(source)
    require_memory(
        source, config, known or stored, target, batch_size, image_size, weights=weights, video_frames=video_frames
    )
    try:
        processor = AutoProcessor.from_pretrained(source)
        model, info = AutoModelForImageTextToText.from_pretrained(source, dtype=wanted, output_loading_info=True)
        model = model.to(target).eval()
    except torch.OutOfMemoryError as error:
        raise DeviceError(f"{source!r} does not fit on {target}: {error}") from error
    except Exception as error:
        raise ModelLoadError(_load_message(source, error)) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        lost = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
        raise ModelLoadError(f"The weights of {source!r} lack or misfit {len(lost)} tensors, {lost[0]!r} first.")
    if not getattr(processor, "chat_template", None):
        raise ModelLoadError(
            f"The processor of {source!r} has no chat template, so questions cannot be put to the model."
        )
    return LoadedModel(model, processor, source)


def _load_message(source: str, error: Exception) -> str:
    first = str(error).strip().splitlines()[0] if str(error).strip() else ""
    place = (
        "model folder" if os.path.isdir(source) else "hub model (is there a network? a local folder works without one)"
    )
    return f"Cannot load {place} {source!r}: {type(error).__name__}: {first}"


def pick_device(name: str) -> torch.device:
    """The device of that name, of several processes each its own GPU.

    Raises:
        DeviceError: it is not there.
    """
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)) % torch.cuda.device_count())
    if name == "auto":
        return torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:
        raise DeviceError(f"Device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error
    return device


def pick_dtype(name: str) -> torch.dtype | str:
    """The dtype of that name, or "auto"."""
    if name == "auto":
        return "auto"
    full = SHORT_DTYPES.get(name, name)
    if full not in DTYPES:
        raise unknown("dtype", name, ["auto", *DTYPES, *SHORT_DTYPES])
    return DTYPES[full]


def fingerprint(source: str) -> str | None:
    """Checksum of a local folder's configuration, tokenizer and weights' sizes and heads; None for a hub name."""
    if not os.path.isdir(source):
        return None
    digest = hashlib.sha256()
    for path in sorted(Path(source).iterdir()):
        if path.suffix in {".json", ".jinja", ".safetensors", ".bin"}:
            with path.open("rb") as file:
                digest.update(f"{path.name}:{path.stat().st_size}:".encode())
                digest.update(file.read(64 * 2**20))
    return digest.hexdigest()[:16]
