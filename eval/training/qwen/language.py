"""Many questions about one picture in one pass, at the M-RoPE positions each would have alone."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from ..common.dropping import gather_tokens, kept_index, kept_mask
from ..common.language import SLOT, Answers, grade, slot_mask
from .tokenizer import VisionPrompts


@lru_cache(maxsize=32)
def slot_layout(prefix: int, size: tuple[int, int], suffix: int, slots: int) -> tuple[Tensor, Tensor]:
    """Additive mask (1, 1, length, length) and position ids (3, 1, length) of prefix, picture, suffix and slots.

    Every slot sees what stands in front of all slots, and itself.
    """
    rows, columns = size
    visual = prefix + grid_positions(size)
    after = prefix + max(size)
    text = torch.cat([torch.arange(suffix), (suffix + torch.arange(SLOT)).repeat(slots)])
    position = torch.cat(
        [torch.arange(prefix).expand(3, -1), visual, (after + text).expand(3, -1)],
        dim=1,
    )
    return slot_mask(prefix + rows * columns + suffix, slots), position[:, None]


def grid_positions(size: tuple[int, int]) -> Tensor:
    """M-RoPE ids (3, tokens) of a picture of rows x columns tokens, counted from its first."""
    row, column = torch.meshgrid(torch.arange(size[0]), torch.arange(size[1]), indexing="ij")
    return torch.stack([torch.zeros_like(row), row, column]).flatten(1)


def answer_kept(
    language: Qwen2_5_VLTextModel,
    prompts: VisionPrompts,
    visual: Tensor,
    size: tuple[int, int],
    kept: Tensor,
    ids: Tensor,
    labels: Tensor,
) -> Answers:
    """What `answer` gives, but for the early loss, without the tokens that are not `kept` (batch, tokens).

    All others have the position ids of the whole prompt.
    """
    batch, slots, _ = ids.shape
    words = language.embed_tokens
    index, valid = kept_index(kept)
    before, after = (words(torch.tensor(part)).expand(batch, -1, -1) for part in (prompts.prefix, prompts.suffix))
    seen = gather_tokens(visual, index).to(before.dtype)
    embeds = torch.cat([before, seen, after, words(ids.flatten(1))], dim=1)
    first, suffix = before.shape[1], after.shape[1]
    text = torch.cat([torch.arange(suffix), (suffix + torch.arange(SLOT)).repeat(slots)])
    position = torch.cat(
        [
            torch.arange(first).expand(3, batch, -1),
            first + grid_positions(size)[:, index],
            (first + max(size) + text).expand(3, batch, -1),
        ],
        dim=-1,
    )
    output = language(
        inputs_embeds=embeds,
        attention_mask=kept_mask(valid, first, suffix, slots),
        position_ids=position,
        use_cache=False,
    )
    start = first + index.shape[1] + suffix
    graded = grade(
        lambda hidden: F.linear(hidden, words.weight), output.last_hidden_state[:, start:], labels, early=False
    )
    return Answers(*graded, (), position, start)


def answer(
    language: Qwen2_5_VLTextModel,
    prompts: VisionPrompts,
    visual: Tensor,
    size: tuple[int, int],
    ids: Tensor,
    labels: Tensor,
) -> Answers:
    """Answer all questions about a batch of pictures.

    `visual` is (batch, tokens, width); `ids` and `labels` are (batch, slots, `SLOT`). The early loss is that of
    answering at the end of the question already (`early_labels`).
    """
    return answer_behind(language, prompts, visual, partial(slot_layout, size=size), ids, labels)


def answer_behind(
    language: Qwen2_5_VLTextModel,
    prompts: VisionPrompts,
    visual: Tensor,
    layout: Callable[..., tuple[Tensor, Tensor]],
    ids: Tensor,
    labels: Tensor,
) -> Answers:
    """Answer all questions about what is shown; `layout` makes mask and position ids of `prefix`, `suffix` and `slots`."""
    batch, slots, _ = ids.shape
    words = language.embed_tokens
    before, after = (words(torch.tensor(part)).expand(batch, -1, -1) for part in (prompts.prefix, prompts.suffix))
    embeds = torch.cat([before, visual, after, words(ids.flatten(1))], dim=1)
    mask, position = layout(prefix=before.shape[1], suffix=after.shape[1], slots=slots)
    output = language(
        inputs_embeds=embeds,
        attention_mask=mask.to(embeds.dtype),
        position_ids=position.expand(-1, batch, -1),
        use_cache=False,
        output_hidden_states=True,
    )
    start = before.shape[1] + visual.shape[1] + after.shape[1]
    graded = grade(
        lambda hidden: F.linear(hidden, words.weight), output.last_hidden_state[:, start:], labels, early=True
    )
    return Answers(*graded, output.hidden_states, position, start)
