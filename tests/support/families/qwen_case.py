"""Prompts for tiny Qwen-VL models: images and videos between vision tokens, and the types of all tokens."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from support.tiny_models import IMAGE_TOKEN, PAD, VOCABULARY, FamilyCase, Row, seeded_pixels, spread_weights

VIDEO_TOKEN, VISION_START, VISION_END = 118, 117, 116
TOKENS = {
    "image_token_id": IMAGE_TOKEN,
    "video_token_id": VIDEO_TOKEN,
    "vision_start_token_id": VISION_START,
    "vision_end_token_id": VISION_END,
}
MERGE, PATCH, FRAMES_PER_PATCH = 2, 2, 2

# (frames, rows, columns) of patches before 2 x 2 of them are merged.
IMAGE_GRIDS = {"small": (1, 8, 8), "large": (1, 12, 16), "default": (1, 12, 12)}
VIDEO_GRIDS = {"small": (2, 8, 8), "large": (4, 8, 12), "default": (3, 8, 8)}

TEXT: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": PAD,
    "bos_token_id": 1,
    "eos_token_id": None,
}


def is_video(name: str) -> bool:
    """Names of videos begin with "video"; "video small" and "video large" differ in size from all others."""
    return name.startswith("video")


def patch_grid(name: str) -> tuple[int, int, int]:
    """Return the (frames, rows, columns) of an image's or video's patches."""
    grids = VIDEO_GRIDS if is_video(name) else IMAGE_GRIDS
    return grids.get(name.removeprefix("video").strip(), grids["default"])


def merged_tokens(name: str) -> int:
    """Return the placeholders of an image or video."""
    return math.prod(patch_grid(name)) // MERGE**2


def patches(name: str) -> dict[str, Tensor]:
    """Return the processor's tensors of an image or video."""
    grid = patch_grid(name)
    pixels = seeded_pixels(name, math.prod(grid), 3 * FRAMES_PER_PATCH * PATCH * PATCH)[0]
    if is_video(name):
        return {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor([grid])}
    return {"pixel_values": pixels, "image_grid_thw": torch.tensor([grid])}


@dataclass(frozen=True, repr=False)
class QwenCase(FamilyCase):
    """A tiny Qwen-VL model.

    Attributes:
        timestamps: whether a video's frames stand apart, each after the text tokens of its time.
        seconds_per_grid: what the processor passes for the time between a video's frames, or None if nothing.
    """

    timestamps: bool = False
    seconds_per_grid: float | None = None

    def inputs(
        self, rows: Sequence[Row], padding: str = "left", dtype: torch.dtype = torch.float32
    ) -> dict[str, Tensor]:
        """Return the model inputs of a padded batch."""
        ids = [self._ids(row) for row in rows]
        width = max(map(len, ids))
        inputs: dict[str, Tensor] = {}
        for key, values, fill in (("input_ids", ids, PAD), ("attention_mask", [[1] * len(row) for row in ids], 0)):
            padding_of = [[fill] * (width - len(row)) for row in values]
            inputs[key] = torch.tensor(
                [gap + row if padding == "left" else row + gap for gap, row in zip(padding_of, values, strict=True)]
            )
        names = [item for row in rows for item in row if isinstance(item, str)]
        for kind in (False, True):
            tensors = [self.image(name) for name in names if is_video(name) == kind]
            for key in tensors[0] if tensors else ():
                joined = torch.cat([tensor[key] for tensor in tensors])
                inputs[key] = joined.to(dtype) if joined.is_floating_point() else joined
            if kind and tensors and self.seconds_per_grid is not None:
                inputs["second_per_grid_ts"] = torch.full((len(tensors),), self.seconds_per_grid)
        inputs["mm_token_type_ids"] = self.types(inputs["input_ids"])
        return inputs

    def longer(self, model: Any, turns: Sequence[dict[str, Tensor]], ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        """Return `generate` inputs for `ids` and `mask`, with positions where the grids of earlier turns are needed for them."""
        inputs = super().longer(model, turns, ids, mask)
        inputs["mm_token_type_ids"] = self.types(ids)
        if len(turns) > 1:
            grids = [grid for row in range(len(ids)) for turn in turns for grid in _image_grids(turn)[row]]
            inputs["position_ids"] = self.positions(model, {**inputs, "image_grid_thw": torch.stack(grids)})
        return inputs

    def types(self, ids: Tensor) -> Tensor:
        """Return `mm_token_type_ids` of a prompt."""
        return token_types(ids)

    def positions(self, model: Any, inputs: dict[str, Tensor]) -> Tensor:
        """Return position ids `[3, batch, tokens]` of a prompt from the host's own function."""
        names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids", "attention_mask")
        given = {name: inputs[name] for name in names if name in inputs}
        return model.model.get_rope_index(inputs["input_ids"], **given)[0]

    def _ids(self, row: Row) -> list[int]:
        ids: list[int] = []
        for item in row:
            if not isinstance(item, str):
                generator = torch.Generator().manual_seed(1000 + 31 * len(ids) + item)
                ids += torch.randint(1, IMAGE_TOKEN - 10, (item,), generator=generator).tolist()
            elif not is_video(item):
                ids += [VISION_START, *[IMAGE_TOKEN] * self.tokens(item), VISION_END]
            elif self.timestamps:
                frames = patch_grid(item)[0]
                for frame in range(frames):
                    ids += [50 + frame, 60, VISION_START, *[VIDEO_TOKEN] * (self.tokens(item) // frames), VISION_END]
            else:
                ids += [VISION_START, *[VIDEO_TOKEN] * self.tokens(item), VISION_END]
        return ids


def _image_grids(inputs: dict[str, Tensor]) -> list[Sequence[Tensor]]:
    ids = inputs["input_ids"]
    counts = ((ids[:, :-1] == VISION_START) & (ids[:, 1:] == IMAGE_TOKEN)).sum(1).tolist()
    return list(inputs["image_grid_thw"].split(counts)) if sum(counts) else [()] * len(counts)


def token_types(ids: Tensor) -> Tensor:
    """Return 1 at image placeholders, 2 at video placeholders, 0 elsewhere."""
    return (ids == IMAGE_TOKEN).int() + 2 * (ids == VIDEO_TOKEN).int()


def finish(model: Any, dtype: torch.dtype) -> Any:
    """Spread the weights, and keep the model from generating placeholders."""
    spread_weights(model)
    with torch.no_grad():
        # Logit 0 is never the largest.
        model.lm_head.weight[VIDEO_TOKEN] = 0
    model.generation_config.pad_token_id = PAD
    model.generation_config.suppress_tokens = [IMAGE_TOKEN]
    return model.to(dtype).eval()


def qwen_case(
    name: str, build: Callable[[torch.dtype], Any], timestamps: bool = False, seconds_per_grid: float | None = None
) -> QwenCase:
    """Return the case of a model whose towers have patches of 2 x 2 pixels and 2 frames, 2 x 2 of them merged."""
    return QwenCase(name, build, patches, merged_tokens, timestamps, seconds_per_grid)
