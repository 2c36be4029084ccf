"""A model of three layers that writes down in which order things happen."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class ToyLayer(nn.Module):
    """Adds its number and notes that it ran."""

    def __init__(self, number: int, log: list[str]) -> None:
        super().__init__()
        self.number = number
        self.log = log

    def forward(self, hidden: Tensor) -> Tensor:
        """Return `hidden + number`."""
        self.log.append(f"layer {self.number}")
        return hidden + self.number


class ToyModel(nn.Module):
    """Three layers, called one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.layers = nn.ModuleList(ToyLayer(number, self.log) for number in range(3))

    def encode(self, value: int) -> int:
        """Stand for a method that the host calls by name and not through `forward`."""
        return value

    def forward(self, hidden: Tensor) -> Tensor:
        """Run the layers."""
        for layer in self.layers:
            hidden = layer(hidden=hidden)
        return hidden


ONES = torch.ones(2, 4)
