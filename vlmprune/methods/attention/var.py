"""VAR: attention that rests on visual sinks goes to the other visual tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.kernels.redistributed_attention import redistributed_attention
from vlmprune.methods.attention_method import AttentionMethod
from vlmprune.methods.checks import check_flag, check_int, check_number
from vlmprune.methods.shared.attention_sinks import (
    Dimensions,
    check_dimensions,
    check_reachable,
    sink_dimensions,
    sink_threshold,
    sink_values,
)


@dataclass(frozen=True, kw_only=True)
class VAR(AttentionMethod):
    """Move attention from sinks to the visual tokens that are none, in the heads that look at the image; nothing is dropped.

    A sink is a token whose hidden state, as it enters a layer, spikes above `tau` times its root mean square in one of a few
    channels. They are found once, in the prefill, in every layer from `first_layer` on, among all tokens of the prompt. In a
    head and row in which visual tokens weigh at least `lowest_weight`, and sinks have at most the share `highest_share` of
    that, every sink, of text or image, loses `move_fraction` of its weight, and the visual tokens that are no sinks share it
    in proportion to their own. Rows are those of text behind an image, of the prompt and of every later step. Generated
    tokens are never sinks. Keys, values, masks and positions stay as they are.

    The layers keep their attention backend: for these rows the weights are computed a second time, and what changes is added
    to the output. It costs time and saves none; gradients take what is added as a constant.

    The channels are those in which the first token of the row spikes in layer `first_layer`, as it does in language models
    with such sinks, all channels where it does not. Published ones go by name: `dimensions="llama-2-7b"` (LLaVA-1.5-7B),
    "llama-2-13b", "qwen2-vl-7b", "internvl2-8b".

    The defaults are the official code's on models of the published widths, `tau=20` is its threshold on any. States of some
    hundred channels and less spike everywhere, so that the threshold tells little there. The paper's rho is the lowest share
    of visual tokens that are no sinks: 0.8 for general tasks is `highest_share=0.2`, 0.5 against hallucination 0.5, 0.9 for
    vision-centric tasks 0.1.

    Source: "See What You Are Told: Visual Attention Sink in Large Multimodal Models", ICLR 2025, arXiv 2503.03321. The paper
    moves the share p of a sink's weight; the official code keeps p = 0.6 and moves 0.4, as here. The paper spares the last
    layer; in the official code that switch has no effect, as here by default. The official code never forgets the sinks of
    the first prompt that a process sees; here they belong to the prompt. It needs eager attention and one row with one image;
    with several images, rows count from the first image of the row on, and visual tokens are those of all images.

    Attributes:
        tau: the spike above which a token is a sink; it must be below the root of the hidden state's width. None for the
            published 20, in hidden states of fewer than 4096 channels for `20 * sqrt(channels / 4096)`.
        move_fraction: share of a sink's weight that moves, in (0, 1].
        highest_share: highest share of sinks in the weight of visual tokens, in [0, 1].
        lowest_weight: lowest weight of visual tokens, in [0, 1].
        first_layer: 0-based layer from which on sinks are looked for.
        except_last_layer: whether the last layer is left as it is.
        dimensions: channels in which sinks spike, a model's name for published ones, or None to find them.
    """

    tau: float | None = None
    move_fraction: float = 0.4
    highest_share: float = 0.5
    lowest_weight: float = 0.2
    first_layer: int = 2
    except_last_layer: bool = False
    dimensions: Dimensions = None

    name: ClassVar[str] = "var"
    symbols: ClassVar[Mapping[str, str]] = {
        "p": "move_fraction=1 - p",
        "beta": "move_fraction=1 - beta",
        "rho": "highest_share=1 - rho of the paper, or rho of the official code",
        "summ": "lowest_weight=summ",
        "dim_sink": "dimensions=dim_sink",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.tau is not None:
            check_number("tau", self.tau, "(0, inf)")
        check_number("move_fraction", self.move_fraction, "(0, 1]")
        check_number("highest_share", self.highest_share, "[0, 1]")
        check_number("lowest_weight", self.lowest_weight, "[0, 1]")
        check_int("first_layer", self.first_layer, 1)
        check_flag("except_last_layer", self.except_last_layer)
        object.__setattr__(self, "dimensions", check_dimensions(self.dimensions))

    def changed_layers(self, layers: int) -> tuple[int, ...]:
        """Return all layers from `first_layer` on."""
        end = layers - self.except_last_layer
        if self.first_layer >= end:
            raise ParameterError(
                f"first_layer={self.first_layer} leaves none of {layers} layers to change"
                f"{', the last one apart' if self.except_last_layer else ''}; nearest: first_layer={end - 1}."
            )
        return tuple(range(self.first_layer, end))

    def check_width(self, width: int) -> None:
        """Raise ParameterError if no token of that width can be a sink."""
        check_reachable(sink_threshold(self.tau, width), width)

    def sink_dimensions(self, first: Tensor) -> Tensor:
        """Return the given channels, or those in which `first` spikes."""
        assert self.dimensions is None or isinstance(self.dimensions, tuple)
        return sink_dimensions(first, self.dimensions, sink_threshold(self.tau, first.shape[-1]))

    def find_sinks(self, hidden: Tensor, dimensions: Tensor) -> Tensor:
        """Return where a token spikes above the threshold."""
        return sink_values(hidden, dimensions[:, None]) > sink_threshold(self.tau, hidden.shape[-1])

    def change(self, query: Tensor, key: Tensor, value: Tensor, flags: Tensor, last: Tensor, scale: float) -> Tensor:
        """Return by how much the attention's output changes."""
        return redistributed_attention(
            query,
            key,
            value,
            flags,
            last,
            moved=self.move_fraction,
            highest_share=self.highest_share,
            lowest_weight=self.lowest_weight,
            scale=scale,
        )[0]

    def change_macs(self, rows: int, keys: int, changed: int, width: int) -> int:
        """The rows' weights on all keys, and the changed weights times the values of visual tokens."""
        return rows * (keys + changed) * width
