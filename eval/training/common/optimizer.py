"""Muon for the matrices of the layers, AdamW for everything else (Keller Jordan et al. 2024; Liu et al., arXiv 2502.16982)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from .language import WIDTH
from .loop import Stage


class MuonAdamW:
    """Two optimizers that act as one; learning rates mean the same for both (updates of matched size).

    `vectors` is a factor for the rates of what AdamW trains.
    """

    def __init__(self, members: Sequence[Sequence[nn.Parameter]], stage: Stage, vectors: float = 1.0) -> None:
        matrices, others = [], []
        for params, rate in zip(members, stage.rates, strict=True):
            inner, rest = [p for p in params if _inside(p)], [p for p in params if not _inside(p)]
            matrices += [{"params": inner, "peak": rate}] if inner else []
            others += [{"params": rest, "peak": vectors * rate}] if rest else []
        rate = stage.rates[0]
        self.parts: dict[str, torch.optim.Optimizer] = {
            "muon": torch.optim.Muon(
                matrices, lr=rate, weight_decay=stage.decay, adjust_lr_fn="match_rms_adamw", momentum=0.9
            ),
            "adamw": torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.98), weight_decay=stage.decay),
        }

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Groups of both."""
        return [group for part in self.parts.values() for group in part.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        for part in self.parts.values():
            part.zero_grad(set_to_none=set_to_none)

    def step(self) -> None:
        """One step of both."""
        for part in self.parts.values():
            part.step()

    def state_dict(self) -> dict[str, Any]:
        """States by name."""
        return {name: part.state_dict() for name, part in self.parts.items()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take states back."""
        for name, part in self.parts.items():
            part.load_state_dict(state[name])


def _inside(parameter: nn.Parameter) -> bool:
    """Whether this is a matrix of a layer; embeddings and heads have a side that is no multiple of the width."""
    return parameter.ndim == 2 and not any(side % WIDTH for side in parameter.shape)
