"""Weights of the first layer's heads: those published for one model, and those that `vlmprune calibrate` wrote."""

from __future__ import annotations

import json
from collections.abc import Sequence
from math import isfinite
from os import PathLike
from pathlib import Path
from typing import Any

from vlmprune.errors import ParameterError
from vlmprune.methods.first_layer import FirstLayer

QWEN2_5_VL_7B = (
    0.0875, 0.3000, 0.0480, 0.0321, 0.0104, 0.0102, 0.0336, 0.0460, 0.0540, 0.0472, 0.0234, 0.0537, 0.0109, 0.0573,
    0.0276, 0.0403, 0.0429, 0.0352, 0.0162, 0.0519, 0.0553, 0.0266, 0.0222, 0.0480, 0.0337, 0.0250, 0.0000, 0.0224,
)  # fmt: skip
"""By head, as published; they need not sum to 1."""

_SHIPPED = {("Qwen2.5-VL", 3584, 28): QWEN2_5_VL_7B}


def shipped_weights(layer: FirstLayer) -> tuple[float, ...]:
    """Return the published weights of a model, or the same for every head."""
    return _SHIPPED.get((layer.family, layer.width, layer.heads), (1.0,) * layer.heads)


def check_weights(given: Any) -> tuple[float, ...]:
    """Return weights that were given as numbers or as a file of `vlmprune calibrate`, summing to 1.

    Raises:
        ParameterError: no such file or no weights in it, no finite numbers >= 0, or nothing but zeros.
    """
    source = "head_weights"
    if isinstance(given, (str, PathLike)):
        source, given = f"head_weights={str(given)!r}", _read(Path(given))
    allowed = "numbers >= 0, one a head and not all 0, or a file that `vlmprune calibrate` wrote"
    if not isinstance(given, Sequence):
        raise ParameterError(f"{source}={given!r}; allowed: {allowed}.")
    for head, weight in enumerate(given):
        number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not number or not isfinite(weight) or weight < 0:
            raise ParameterError(f"{source} has {weight!r} for head {head}; allowed: {allowed}.")
    total = sum(given)
    if not total:
        raise ParameterError(f"{source} holds {len(given)} weights, none above 0; allowed: {allowed}.")
    return tuple(float(weight) / total for weight in given)


def check_head_count(weights: tuple[float, ...], layer: FirstLayer) -> None:
    """Raise ParameterError unless there is one weight for each head of the layer."""
    if len(weights) != layer.heads:
        raise ParameterError(
            f"head_weights has {len(weights)} weights, the first layer of this {layer.family} model has {layer.heads} heads; "
            "allowed: one a head, or None."
        )


def _read(path: Path) -> Any:
    try:
        found = json.loads(path.read_text())["head_weights"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ParameterError(
            f"head_weights={str(path)!r}: {type(error).__name__}: {error}; allowed: a file that `vlmprune calibrate` wrote, or "
            "numbers, one a head."
        ) from None
    return found
