"""How much memory a model will need, how much there is, and the highest use since a mark."""

from __future__ import annotations

import gc
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import AutoModelForImageTextToText, PreTrainedConfig

from vlmprune.errors import VlmpruneError
from vlmprune.eval.flops import LanguageShape, vision_cost
from vlmprune.patches.families.facts import tower_width

from .synthetic_request import synthetic_request

GIB = 2**30
CGROUP = Path("/sys/fs/cgroup")
PROCESS = Path("/proc/self/status")
TYPICAL_IMAGE = (672, 672)
TYPICAL_TEXT = 128


class DeviceError(VlmpruneError, RuntimeError):
    """The device does not exist here or the model does not fit on it."""


@dataclass(frozen=True)
class MemoryNeed:
    """Bytes that a model needs to answer `batch_size` prompts of `tokens` tokens each; all but the weights are estimates."""

    weights: int
    cache: int
    activations: int
    batch_size: int
    tokens: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.weights + self.cache + self.activations


def require_memory(
    name: str,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    device: torch.device,
    batch_size: int = 1,
    image_size: tuple[int, int] = TYPICAL_IMAGE,
    text_tokens: int = TYPICAL_TEXT,
    weights: int | None = None,
    video_frames: int = 0,
) -> None:
    """Check that a model and the prompts to expect fit on a device, before anything large is loaded.

    Args:
        name: the model's name for the error.
        config: its configuration.
        dtype: of weights and cache.
        device: where it is to be.
        batch_size: prompts at once.
        image_size: width and height of their pictures.
        text_tokens: their text tokens.
        weights: bytes of the weights where known.
        video_frames: frames of the video that each prompt shows in place of a picture.

    Raises:
        DeviceError: it does not; names what is needed and what is free.
    """
    free = free_memory(device)
    if free is None:
        return
    need = memory_need(config, dtype, batch_size, image_size, text_tokens, weights, video_frames)
    if need.total > free:
        prompts = "a prompt" if need.batch_size == 1 else f"{need.batch_size} prompts"
        shown = str(dtype).removeprefix("torch.")
        raise DeviceError(
            f"{name!r} needs about {need.total / GIB:.1f} GiB: {need.weights / GIB:.1f} GiB of weights in {shown}, "
            f"{need.cache / GIB:.2f} GiB of keys and values and {need.activations / GIB:.2f} GiB of activations for "
            f"{prompts} of {need.tokens:,} tokens. {free / GIB:.1f} GiB are free on {device}. "
            "A smaller model, batch size or dtype needs less."
        )


def memory_need(
    config: PreTrainedConfig,
    dtype: torch.dtype,
    batch_size: int = 1,
    image_size: tuple[int, int] = TYPICAL_IMAGE,
    text_tokens: int = TYPICAL_TEXT,
    weights: int | None = None,
    video_frames: int = 0,
) -> MemoryNeed:
    """Weights, keys and values, and the largest activations of a prefill, unpruned.

    Activations: the tower's hidden states of all layers (the LLaVA families keep them), one layer's states and feed-forward
    intermediates of tower and language model, and fp32 logits of one token.
    """
    if weights is None:
        weights = parameter_count(config) * dtype.itemsize
    inputs = synthetic_request(config, image_size, text_tokens, video_frames=video_frames)
    tokens = inputs["input_ids"].shape[1]
    shown = ([0], [1]) if video_frames else ([1], [0])
    vision, shape = vision_cost(config), LanguageShape.from_config(config)
    patches = sum(vision.segments(config, vision.work(config, inputs, *shown)[0], 0))
    tower = patches * tower_width(config) * (vision.facts(config).layers + 1 + 8)
    language = tokens * (6 * shape.hidden + 3 * shape.ffn)
    activations = max(tower, language) * dtype.itemsize + 4 * shape.vocab
    cache = shape.cache_bytes([tokens] * shape.layers, dtype.itemsize)
    return MemoryNeed(weights, batch_size * cache, batch_size * activations, batch_size, tokens)


def parameter_count(config: PreTrainedConfig) -> int:
    """Parameters of the model that `config` describes, tied ones once; builds it on the meta device."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    model.tie_weights()
    return sum(parameter.numel() for parameter in model.parameters())


def stored_bytes(source: str) -> int | None:
    """Size of the weight files of a local folder; None for a hub name."""
    if not os.path.isdir(source):
        return None
    files = list(Path(source).glob("*.safetensors")) or list(Path(source).glob("pytorch_model*.bin"))
    return sum(file.stat().st_size for file in files)


def free_memory(device: torch.device) -> int | None:
    """Bytes that can be had on `device`; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    found = [amount for amount in (_available_memory(), _container_memory()) if amount is not None]
    return min(found, default=None)


def _available_memory() -> int | None:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _container_memory() -> int | None:
    """What the limit of a container (cgroup 2) leaves; files that are only cached do not count as used."""
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        cached = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())["inactive_file"]
    except (OSError, ValueError, KeyError):
        return None
    return None if limit == "max" else int(limit) - used + int(cached)


def _kilobytes(file: Path, name: str) -> int | None:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


@contextmanager
def garbage_kept() -> Iterator[None]:
    """Collect garbage now and not before the block ends: memory that is freed in between would hide what is taken."""
    gc.collect()
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


class PeakMemory:
    """How far memory use rose since `start`: of the GPU's allocator, or of the process where there is no GPU."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def start(self) -> None:
        """Forget earlier peaks, and note what is in use."""
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before: int | None = int(torch.cuda.memory_allocated(self.device))
        else:
            self._before = _kilobytes(PROCESS, "VmRSS:") if _reset_peak() else None

    def read(self) -> int | None:
        """Bytes; None where the system cannot tell."""
        if self.device.type == "cuda":
            peak: int | None = int(torch.cuda.max_memory_allocated(self.device))
        else:
            peak = _kilobytes(PROCESS, "VmHWM:")
        return max(peak - self._before, 0) if peak is not None and self._before is not None else None


def _reset_peak() -> bool:
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
