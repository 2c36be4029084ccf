"""Replies to prompts without a task around them, and how two models' replies differ."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

import vlmprune
from vlmprune.eval.flops import equivalent_tokens

from .live_model import LiveModel
from .questions import user_turn
from .request_records import RequestRecord


class Asked(Protocol):
    """A question with its pictures."""

    @property
    def text(self) -> str:
        """The question."""

    @property
    def images(self) -> Sequence[Any]:
        """Pictures, or their paths."""


@dataclass(frozen=True, eq=False)
class Reply:
    """Greedy answer to a prompt, its text, and log-probabilities [vocabulary] of its first token.

    `kept` has for every picture of one plain raster its rows, columns and the kept tokens of the last layer.
    """

    prompt: int
    tokens: tuple[int, ...]
    first: Tensor
    text: str = ""
    kept: tuple[tuple[int, int, tuple[int, ...]], ...] = ()


@dataclass(frozen=True)
class Agreement:
    """One prompt under a pruned model, compared with the unpruned one; `answer` and `kept` are the pruned one's."""

    prompt: int
    visual_tokens: float
    same_answer: bool
    same_first_token: bool
    kl: float
    answer: str = ""
    kept: tuple[tuple[int, int, tuple[int, ...]], ...] = ()


def replies(
    live: LiveModel, batches: Sequence[tuple[int, Sequence[Asked]]], new_tokens: int, on_progress: Callable[[int], Any]
) -> list[Reply]:
    """Greedy token ids and first-token log-probabilities (on the CPU) of every prompt, as the model stands.

    `batches` come with the number of their first prompt.
    """
    found: list[Reply] = []
    for start, batch in batches:
        tokens, first = live.reply([user_turn(prompt.text, prompt.images) for prompt in batch], new_tokens)
        kept = _kept_tokens(live, len(batch))
        for number, (answer, row) in enumerate(zip(tokens, first.cpu(), strict=True)):
            text = live.tokenizer.decode(answer, skip_special_tokens=True).strip()
            found.append(Reply(start + number, answer, row, text, kept[number]))
        on_progress(len(batch))
    return found


def _kept_tokens(live: LiveModel, rows: int) -> list[tuple[tuple[int, int, tuple[int, ...]], ...]]:
    found: list[list[tuple[int, int, tuple[int, ...]]]] = [[] for _ in range(rows)]
    if live.pruned:
        for image in vlmprune.last_run(live.model).images:
            if image.grid is not None:
                found[image.batch_index].append((*image.grid, tuple(image.kept.tolist())))
    return [tuple(images) for images in found]


def agreement(full: Sequence[Reply], pruned: Sequence[Reply], records: Sequence[RequestRecord]) -> list[Agreement]:
    """Prompt by prompt, two runs over the same prompts; `records` are those of the pruned one."""
    return [
        Agreement(
            prompt=after.prompt,
            visual_tokens=equivalent_tokens(record.visual_per_layer),
            same_answer=before.tokens == after.tokens,
            same_first_token=bool(before.first.argmax() == after.first.argmax()),
            kl=(before.first.exp() * (before.first - after.first)).sum().item(),
            answer=after.text,
            kept=after.kept,
        )
        for before, after, record in zip(full, pruned, records, strict=True)
    ]
