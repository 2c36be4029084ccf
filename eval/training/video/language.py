"""Many questions about one clip in one pass, at the M-RoPE positions each would have alone."""

from __future__ import annotations

from functools import lru_cache, partial

import torch
from torch import Tensor
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from ..common.language import SLOT, Answers, slot_mask
from ..qwen.language import answer_behind
from ..qwen.tokenizer import VisionPrompts
from .model import TIME_STEP


@lru_cache(maxsize=32)
def clip_layout(prefix: int, moments: int, side: int, suffix: int, slots: int) -> tuple[Tensor, Tensor]:
    """Additive mask (1, 1, length, length) and position ids (3, 1, length) of prefix, clip, suffix and slots.

    The text behind a clip starts after its rows and columns, not after its time, as in the host.
    """
    time, row, column = torch.meshgrid(torch.arange(moments), torch.arange(side), torch.arange(side), indexing="ij")
    visual = prefix + torch.stack([TIME_STEP * time, row, column]).flatten(1)
    text = torch.cat([torch.arange(suffix), (suffix + torch.arange(SLOT)).repeat(slots)])
    position = torch.cat(
        [torch.arange(prefix).expand(3, -1), visual, (prefix + side + text).expand(3, -1)],
        dim=1,
    )
    return slot_mask(prefix + moments * side * side + suffix, slots), position[:, None]


def answer(
    language: Qwen2_5_VLTextModel,
    prompts: VisionPrompts,
    visual: Tensor,
    moments: int,
    side: int,
    ids: Tensor,
    labels: Tensor,
) -> Answers:
    """Answer all questions about a batch of clips.

    `visual` is (batch, moments * tokens, width); `ids` and `labels` are (batch, slots, `SLOT`).
    """
    layout = partial(clip_layout, moments=moments, side=side)
    return answer_behind(language, prompts, visual, layout, ids, labels)
