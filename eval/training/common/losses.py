"""Losses and figures on labels of which most say "nothing here"."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor
from torch.nn import functional as F


def label_loss(logits: Tensor, target: Tensor) -> Tensor:
    """Cross-entropy of `logits [..., classes]` in which class 0, "nothing here", weighs less."""
    weight = torch.ones(logits.shape[-1])
    weight[0] = 0.3
    return F.cross_entropy(logits.flatten(0, -2), target.flatten(), weight=weight)


@torch.no_grad()
def label_accuracy(logits: Tensor, target: Tensor) -> float:
    """Share of right labels where there is something."""
    held = target > 0
    return (logits.argmax(-1) == target)[held].float().mean().item()


def weighed(losses: Mapping[str, Tensor], weights: Mapping[str, float]) -> Tensor:
    """Weighted sum of losses (weight 1 where none is given)."""
    return torch.stack([weights.get(name, 1.0) * loss for name, loss in losses.items()]).sum()


class Asked(Protocol):
    """A batch that knows the task of each question of each picture."""

    tasks: list[list[str]]


def by_task(batch: Asked, right: Tensor) -> dict[str, float]:
    """Share of right answers of each task in a batch."""
    found: dict[str, list[bool]] = {}
    for tasks, row in zip(batch.tasks, right.tolist(), strict=True):
        for task, hit in zip(tasks, row, strict=True):
            found.setdefault(task, []).append(hit)
    return {task: sum(hits) / len(hits) for task, hits in found.items()}
