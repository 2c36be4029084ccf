"""The projector as methods see it: two linear layers with an activation between them, a norm before the first or not."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor


@dataclass(frozen=True, eq=False)
class ProjectorLayers:
    """Weights of a projector.

    Attributes:
        first: `[hidden, patches * dim]`, weight of the first linear layer.
        first_bias: `[hidden]`, or None.
        activation: what is between the layers, element by element.
        second: `[out, hidden]`, weight of the second linear layer.
        patches: patches side by side in a row of the first layer's input, each of which is normed by itself.
        norm: "layer" or "rms", or None where there is no norm.
        norm_weight: `[dim]`, or None.
        norm_bias: `[dim]`, or None.
        epsilon: what the norm adds to the variance.
    """

    first: Tensor
    first_bias: Tensor | None
    activation: Callable[[Tensor], Tensor]
    second: Tensor
    patches: int = 1
    norm: Literal["layer", "rms"] | None = None
    norm_weight: Tensor | None = None
    norm_bias: Tensor | None = None
    epsilon: float = 0.0
