"""How well a pair finds what the questions of the test set ask for."""

from __future__ import annotations

from collections import defaultdict
from itertools import islice
from statistics import fmean
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vlmprune.methods.shared.contrastive import ContrastiveTower

from ..common.questions import TASKS
from ..common.scenes import decode_jpeg, encode_jpeg, make_scene, render
from ..common.stream import TEST_SEED
from ..llava.tower import normalise
from .asked import asked_patches
from .pictures import TILES

WAYS = ("feature layer, normed", "last layer, normed", "last layer, official code")
"""How `cdpruner`, and `recoverable_compression` in its modes "fixed" and "code", compare patches and text."""


def area_under_curve(scores: Tensor, wanted: Tensor) -> float:
    """Chance that a wanted patch scores higher than another; 0.5 is guessing. `scores` `[patches]`, `wanted` bool alike."""
    rank = torch.empty(len(scores), dtype=torch.float64)
    rank[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    count = int(wanted.sum())
    return float((rank[wanted].sum() - count * (count + 1) / 2) / (count * (len(scores) - count)))


@torch.inference_mode()
def measure(source: Any, tower: Any, name: str, feature_layer: int, pictures: int) -> dict[str, dict[str, float]]:
    """Mean `area_under_curve` of the first test pictures, by task and by way; tiles that show nothing asked for are left out.

    Args:
        source: folder of the pair, or model and tokenizer.
        tower: the shipped model's own vision tower.
        name: the shipped model.
        feature_layer: index into its hidden states.
        pictures: how many.
    """
    pair, found = ContrastiveTower(source), defaultdict(list)
    cpu = torch.device("cpu")
    for scene, questions in islice(_test_scenes(), pictures):
        pixels, marks = TILES[name](decode_jpeg(encode_jpeg(render(scene))), scene)
        labels = torch.from_numpy(marks)
        hidden = tower(normalise(pixels), output_hidden_states=True).hidden_states
        for task, question in questions.items():
            wanted, _ = asked_patches(question, labels)
            text, last = pair.text(question, cpu).mean(0), pair.last_place(question, cpu).mean(0)
            for tile in wanted.any(-1).nonzero().flatten().tolist():
                states = [hidden[feature_layer][tile, 1:], hidden[-1][tile, 1:]]
                ways = [(pair.patches(state), text) for state in states] + [
                    (pair.patches(states[1], normed=False), last)
                ]
                for way, (patches, words) in zip(WAYS, ways, strict=True):
                    scores = torch.cosine_similarity(patches, words[None], dim=-1)
                    found[way, task].append(area_under_curve(scores, wanted[tile]))
    return {way: {task: fmean(found[way, task]) for task in TASKS if found[way, task]} for way in WAYS}


def _test_scenes() -> Any:
    """The scenes of the test set with their questions, as `make_rows` draws them."""
    for index in range(2**31):
        rng = np.random.default_rng([TEST_SEED, index])
        scene = make_scene(rng, test=True)
        asked = {task: ask(scene, rng) for task, ask in TASKS.items()}
        if all(asked.values()):
            yield scene, {task: question.text for task, question in asked.items() if question is not None}
