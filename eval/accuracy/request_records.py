"""The token counts of every request, from which its cost follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedModel

import vlmprune
from vlmprune.eval.flops import VisionWork, vision_cost
from vlmprune.eval.models.visual_tokens import visual_tokens
from vlmprune.record import RunRecord

from .questions import Question


@dataclass(frozen=True)
class RequestRecord:
    """Token counts of one request: visual ones before pruning and by layer of the LLM, and the tower's work.

    `images`: visual tokens of each image or video before and after the input of the language model; empty for the unpruned model.
    """

    task: str
    doc_id: int
    visual_before: int
    visual_per_layer: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    work: VisionWork
    images: tuple[tuple[int, int], ...] = ()


def request_records(
    model: PreTrainedModel,
    pruned: bool,
    batch: Sequence[Question],
    inputs: Mapping[str, Any],
    new_tokens: Sequence[int],
    rows_per_question: int = 1,
) -> list[RequestRecord]:
    """Records of the questions of a batch that count, from the model's latest run.

    Args:
        model: the model.
        pruned: whether a method is applied to it.
        batch: the questions.
        inputs: the processor's output for them.
        new_tokens: tokens generated for each.
        rows_per_question: beams that each was repeated for.
    """
    config = model.config
    is_visual = visual_tokens(config, inputs["input_ids"])
    before = is_visual.sum(-1).tolist()
    images: list[tuple[tuple[int, int], ...]]
    if pruned:
        run = vlmprune.last_run(model)
        layers = [tuple(row) for row in run.visual_tokens_per_layer[::rows_per_question]]
        text = list(run.text_tokens[::rows_per_question])
        images = entering_images(run, inputs["input_ids"].shape[0], rows_per_question)
    else:
        images = [()] * len(batch)
        depth = config.get_text_config().num_hidden_layers
        layers = [(count,) * depth for count in before]
        text = (inputs["attention_mask"].bool() & ~is_visual).sum(-1).tolist()
    seen = [len(question.turn.images) for question in batch], [len(question.turn.videos) for question in batch]
    works = vision_cost(config).work(config, inputs, *seen)
    found = zip(batch, before, layers, text, new_tokens, works, images, strict=True)
    return [RequestRecord(question.task, question.doc_id, *counts) for question, *counts in found if question.counted]


def entering_images(run: RunRecord, rows: int, expansion: int = 1) -> list[tuple[tuple[int, int], ...]]:
    """Visual tokens of every image of `rows` prompts before and after the input of the language model.

    `expansion` is the number of beams that each prompt was repeated for.
    """
    kept = run.kept_by_stage[0][1] if run.kept_by_stage else run.kept_per_image
    found: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for row, total, tokens in zip(run.image_rows, run.image_totals, kept, strict=True):
        if row % expansion == 0:
            found[row // expansion].append((total, tokens if isinstance(tokens, int) else len(tokens)))
    return [tuple(images) for images in found]
