"""Attention sinks, told by a spike in a few channels of the hidden state."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from vlmprune.errors import ParameterError, unknown

SINK_DIMENSIONS: Mapping[str, tuple[int, ...]] = {
    "llama-2-7b": (1415, 2533),
    "llama-2-13b": (2100, 4743),
    "qwen2-vl-7b": (458, 2570),
    "internvl2-8b": (3584,),
}
"""Channels in which sinks spike, as published, by language model; that of LLaVA-1.5 is a fine-tuned Llama 2."""

Dimensions = Sequence[int] | str | None
_EPSILON = 1e-6


# The published threshold, and the width of the language model that it is published for.
_TAU, _WIDTH = 20.0, 4096


def sink_threshold(tau: float | None, width: int) -> float:
    """Return `tau`, or that for hidden states of `width` channels.

    The published 20 says that one of 4096 channels holds a tenth of the energy (400 of 4096). In narrower states it is the
    threshold for the same share, as the highest possible spike is the root of the width; in wider ones it stays 20.
    """
    return tau if tau is not None else _TAU * min(1.0, width / _WIDTH) ** 0.5


def check_dimensions(given: Dimensions) -> tuple[int, ...] | None:
    """Return channels that were given by themselves or by the name of a model as a tuple.

    Raises:
        UnknownNameError: a name that is none of `SINK_DIMENSIONS`.
        ParameterError: not ints >= 0, or none.
    """
    if given is None:
        return None
    if isinstance(given, str):
        if given not in SINK_DIMENSIONS:
            raise unknown("dimensions", given, SINK_DIMENSIONS)
        return SINK_DIMENSIONS[given]
    wrong = not isinstance(given, Sequence) or not given
    if wrong or any(isinstance(item, bool) or not isinstance(item, int) or item < 0 for item in given):
        raise ParameterError(
            f"dimensions={given!r}; allowed: channels of the hidden state, ints >= 0, the name of a model "
            f"({', '.join(SINK_DIMENSIONS)}), or None."
        )
    return tuple(given)


def spikes(hidden: Tensor) -> Tensor:
    """Return how many times its root mean square each channel of `hidden [..., dim]` is, fp32 `[..., dim]`."""
    values = hidden.float()
    return values.abs() * (values.square().mean(-1, keepdim=True) + _EPSILON).rsqrt()


def sink_values(hidden: Tensor, dimensions: Tensor) -> Tensor:
    """Return the highest spike of every token in the given channels, fp32 `[...]`.

    Args:
        hidden: `[..., dim]`, what enters a decoder layer, before its norm.
        dimensions: bool `[..., dim]`, broadcast with `hidden`.
    """
    return spikes(hidden).masked_fill(~dimensions, 0.0).amax(-1)


def sink_dimensions(first: Tensor, given: tuple[int, ...] | None, tau: float) -> Tensor:
    """Return the channels that tell sinks in each row, bool `[batch, dim]`.

    Args:
        first: `[batch, dim]`, the hidden state of the first token of each row, which is a sink of the language model.
        given: the channels, or None for those in which `first` spikes above `tau`, all channels where it does not.
        tau: the threshold.

    Raises:
        ParameterError: a channel that the hidden state does not have.
    """
    width = first.shape[-1]
    if given is not None:
        if max(given) >= width:
            raise ParameterError(
                f"dimensions={given}: the hidden state has {width} channels; allowed: 0 to {width - 1}, or None."
            )
        mask = torch.zeros(width, dtype=torch.bool, device=first.device)
        mask[list(given)] = True
        return mask.expand(len(first), -1)
    high = spikes(first) > tau
    return high | ~high.any(-1, keepdim=True)


def check_reachable(tau: float, width: int) -> None:
    """Raise ParameterError if no token of that width can spike above `tau`: the highest is the root of the width."""
    if tau >= width**0.5:
        raise ParameterError(
            f"tau={tau:g} cannot be exceeded by hidden states of {width} channels, whose highest spike is {width**0.5:.4g}; "
            f"allowed: less than that; nearest: tau={int(width**0.5 * 100) / 100:g}."
        )
