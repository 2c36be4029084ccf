"""Seeded batches of clips."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from ..common.scenes import decode_jpeg, encode_jpeg
from ..qwen.batches import SizedBatch, SizedPlan
from ..qwen.batches import make_batch as make_pictures
from ..qwen.tokenizer import VisionPrompts
from .clips import FRAMES, KINDS, MOMENTS, make_clip, render_clip
from .labels import clip_labels
from .questions import ask_clip


@dataclass(frozen=True)
class ClipPlan:
    """What a batch holds: about `tokens` visual tokens in clips of one length, of the `kinds` in turn.

    One batch in `pictures` is of pictures.
    """

    tokens: int
    kinds: tuple[str, ...] = KINDS
    draw: bool = True
    pictures: int = 0
    picture_plan: SizedPlan | None = None


@dataclass
class ClipBatch:
    """Clips of one length with their labels and question slots.

    Attributes:
        moments: length of the clips.
        pixels: the different moments of all clips (pictures, 2, height, width, 3), `uint8`; empty if nothing is drawn.
        patch_labels: labels of their patches (pictures, labels, tokens, 4).
        picture_labels: labels of their tokens (pictures, labels, tokens).
        shown: which picture every moment shows (batch, moments).
        labels: labels of all tokens (batch, labels, moments * tokens).
        events: event of each token (batch, moments * tokens), as in `EVENTS`.
        ranks: rank of each token (batch, moments * tokens).
        ways: the way that what each token shows has gone (batch, moments * tokens, 2).
        ids: question slots, as in `Prompts.ask`.
        targets: their labels.
        tasks: task of each slot.
    """

    moments: int
    pixels: Tensor
    patch_labels: Tensor
    picture_labels: Tensor
    shown: Tensor
    labels: Tensor
    events: Tensor
    ranks: Tensor
    ways: Tensor
    ids: Tensor
    targets: Tensor
    tasks: list[list[str]]


TOKENS = 25
"""Visual tokens of a moment."""


def make_batch(plan: ClipPlan, prompts: VisionPrompts, rng: np.random.Generator) -> ClipBatch | SizedBatch:
    """One batch of clips, or of pictures as the plan says."""
    if plan.picture_plan is not None and rng.integers(plan.pictures) == 0:
        return make_pictures(plan.picture_plan, prompts, rng)
    moments = int(rng.integers(MOMENTS[0], MOMENTS[1] + 1))
    number = max(2, round(plan.tokens / (moments * TOKENS)))
    # Four moments are too few for four things that come one by one.
    kinds = ["motion" if moments == MOMENTS[0] else plan.kinds[i % len(plan.kinds)] for i in range(number)]
    clips = [make_clip(rng, kind, moments) for kind in kinds]
    asked = [ask_clip(clip, rng) for clip in clips]
    slots = [[prompts.slot(question.text, question.answer) for question in questions] for questions in asked]
    labels = [clip_labels(clip) for clip in clips]
    tokens, events, ranks = (torch.from_numpy(np.stack([found[part] for found in labels])) for part in (1, 2, 3))
    ways = torch.from_numpy(np.stack([found[4] for found in labels]))
    pixels: list[np.ndarray] = []
    patch_labels: list[np.ndarray] = []
    picture_labels: list[np.ndarray] = []
    shown: list[list[int]] = []
    for clip, (of_patches, of_tokens, *_) in zip(clips, labels, strict=True):
        numbers: dict[tuple[int, ...], int] = {}
        pictures, order = render_clip(clip) if plan.draw else ([], [])
        decoded = [decode_jpeg(encode_jpeg(picture)) for picture in pictures]
        row = []
        for moment in range(moments):
            key = tuple(order[FRAMES * moment : FRAMES * (moment + 1)]) if plan.draw else (moment,)
            if key not in numbers:
                numbers[key] = len(patch_labels)
                patch_labels.append(of_patches[moment])
                picture_labels.append(of_tokens[moment])
                if plan.draw:
                    pixels.append(np.stack([decoded[number] for number in key]))
            row.append(numbers[key])
        shown.append(row)
    return ClipBatch(
        moments=moments,
        pixels=torch.from_numpy(np.stack(pixels)) if pixels else torch.empty(0),
        patch_labels=torch.from_numpy(np.stack(patch_labels)),
        picture_labels=torch.from_numpy(np.stack(picture_labels)),
        shown=torch.tensor(shown),
        labels=tokens.transpose(1, 2).flatten(2),
        events=events.flatten(1),
        ranks=ranks.flatten(1),
        ways=ways.flatten(1, 2),
        ids=torch.tensor([[slot[0] for slot in row] for row in slots]),
        targets=torch.tensor([[slot[1] for slot in row] for row in slots]),
        tasks=[[question.task for question in questions] for questions in asked],
    )
