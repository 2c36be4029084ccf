"""Prompts with pruned videos: the positions with which they enter tiny models of the real classes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers import (
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)

import vlmprune
from official_cases.input_site import Tensors
from vlmprune.methods import InputMethod
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.needs import VIDEOS

START, END, PAD = 151652, 151653, 151656
_TOKENS = {
    "image_token_id": 151655,
    "video_token_id": PAD,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_TEXT = {
    "vocab_size": PAD + 1,
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 16,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 2, 2]},
}
_VISION = {"depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "patch_size": 2}


@dataclass(frozen=True, kw_only=True)
class Given(InputMethod):
    """Keeps just the tokens of its mask, of all videos one after the other."""

    mask: tuple[bool, ...] = ()

    name: ClassVar[str] = "given"
    needs: ClassVar[frozenset] = frozenset({VIDEOS})

    def select(self, batch: VisualBatch) -> Selection:
        """Follow the mask."""
        parts = torch.tensor(self.mask).split(list(batch.counts))
        kept = [part.nonzero().flatten() for part in parts]
        return Selection(torch.cat(kept), tuple(map(len, kept)))


@lru_cache(maxsize=2)
def _qwen25(tokens_per_second: int) -> Any:
    vision = {**_VISION, "out_hidden_size": 16, "window_size": 8, "fullatt_block_indexes": [0]}
    config = Qwen2_5_VLConfig(
        text_config=dict(_TEXT), vision_config={**vision, "tokens_per_second": tokens_per_second}, **_TOKENS
    )
    return Qwen2_5_VLForConditionalGeneration(config).eval()


@lru_cache(maxsize=1)
def _qwen3() -> Any:
    vision = {**_VISION, "out_hidden_size": 16, "num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
    text = {**_TEXT, "rope_parameters": {**_TEXT["rope_parameters"], "mrope_interleaved": True}}
    return Qwen3VLForConditionalGeneration(Qwen3VLConfig(text_config=text, vision_config=vision, **_TOKENS)).eval()


def entering_positions(params: Mapping[str, Any], inputs: Tensors, mask: Tensor) -> Tensors:
    """Run a pruned model on the full prompt; return the positions that its language model gets, and those of the full prompt."""
    mask, thw = mask.bool(), inputs["thw"].view(-1, 3)
    ids = inputs["input_ids"].flatten()
    qwen3 = params.get("family") == "qwen3_vl"
    model = _qwen3() if qwen3 else _qwen25(params["tokens_per_second"])
    # What "thw" has of one video holds for each of them.
    grids = thw if len(thw) == params.get("videos", 1) else thw.repeat(params.get("videos", 1), 1)
    if not qwen3:
        ids = _full_prompt(ids, mask, [int(grid.prod()) // 4 for grid in grids])
    values = 3 * model.config.vision_config.temporal_patch_size * 4
    call = {
        "input_ids": ids[None],
        "attention_mask": torch.ones(1, len(ids), dtype=torch.int64),
        "mm_token_type_ids": 2 * (ids == PAD).int()[None],
        "pixel_values_videos": torch.randn(
            int(grids.prod(1).sum()), values, generator=torch.Generator().manual_seed(0)
        ),
        "video_grid_thw": grids,
    }
    if not qwen3:
        call["second_per_grid_ts"] = torch.full((len(grids),), float(params["second_per_grid_t"]))
    full = _entering(model, call)
    with vlmprune.pruned(model, Given(keep=0.5, mask=tuple(mask.tolist()))):
        kept, columns = _entering(model, call), vlmprune.last_run(model).kept_columns(0)
    return {
        "hf_full_positions": full,
        "hf_full_delta": model.model.rope_deltas.flatten()[:1],
        "gathered_positions": kept,
        "keep": columns,
    }


def recomputed_positions(params: Mapping[str, Any], inputs: Tensors) -> Tensors:
    """The positions that vLLM computes anew, where its own layout of the grid begins behind the vision marker.

    The library does not use them: they are here to show how they differ.
    """
    frames, rows, columns = params["T"], params["h"], params["w"]
    step = params["tokens_per_second"] * params["second_per_grid_t"]
    time = (torch.arange(frames) * step).long().repeat_interleave(rows * columns)
    row = torch.arange(rows).repeat_interleave(columns).repeat(frames)
    column = torch.arange(columns).repeat(frames * rows)
    media = torch.stack([time, row, column, torch.full_like(time, columns)], dim=1)
    ids, parts = inputs["input_ids"].flatten().tolist(), iter(inputs["mask"].bool().split(len(media)))
    positions: list[Tensor] = []
    following, place = 0, 0
    while place < len(ids):
        if ids[place] != PAD:
            positions.append(torch.full((3, 1), following))
            following, place = following + 1, place + 1
            continue
        own = media[next(parts)]
        positions.append(own[:, :3].T + following)
        following, place = following + columns, place + len(own)
    found = torch.cat(positions, dim=1)
    return {"media_positions": media, "vllm_positions": found, "vllm_delta": (found.max() + 1 - len(ids))[None]}


def _entering(model: Any, call: Tensors) -> Tensor:
    """Run a call; return the positions `[3, tokens]` that the language model gets."""
    entered: list[Tensor] = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: entered.append(kwargs["position_ids"]), with_kwargs=True
    )
    try:
        with torch.no_grad():
            model(**call)
    finally:
        handle.remove()
    return entered[0][-3:, 0]


def _full_prompt(ids: Tensor, mask: Tensor, totals: list[int]) -> Tensor:
    """Put the dropped placeholders back into a pruned prompt."""
    full: list[int] = []
    kept = iter([int(part.sum()) for part in mask.split(totals)])
    sizes, place, values = iter(totals), 0, ids.tolist()
    while place < len(values):
        if values[place] != PAD:
            full.append(values[place])
            place += 1
            continue
        full += [PAD] * next(sizes)
        place += next(kept)
    return torch.tensor(full)
