"""The base of the methods that change attention inside the language model and drop nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..errors import ParameterError
from .base import Method, Site
from .needs import DECODER_ATTENTION, STILL_IMAGES, Need


@dataclass(frozen=True, kw_only=True)
class AttentionMethod(Method):
    """A method that changes what decoder layers attend to, in prefill and in every later step.

    Attributes:
        keep: None; nothing is dropped.
    """

    site: ClassVar[Site] = "attention"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, DECODER_ATTENTION})

    def __post_init__(self) -> None:
        if self.keep is not None:
            raise ParameterError(
                f"keep={self.keep!r}: {self.name!r} changes attention and drops no visual tokens; leave keep unset, or combine "
                "it with a method that drops: apply(model, [DivPrune(keep=0.25), VAR()])."
            )

    def changed_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers whose attention changes in a language model of `layers` layers, ascending.

        Raises:
            ParameterError: there are none.
        """
        raise NotImplementedError

    def check_width(self, width: int) -> None:
        """Raise ParameterError if the method cannot act on hidden states of that width."""

    def sink_dimensions(self, first: Tensor) -> Tensor:
        """Return the channels that tell sinks, bool `[batch, dim]`, from the first token of each row `[batch, dim]`.

        It is asked once a prefill, in the first layer that changes.
        """
        raise NotImplementedError

    def find_sinks(self, hidden: Tensor, dimensions: Tensor) -> Tensor:
        """Return which tokens are sinks of a layer, bool `[batch, width]`, from what enters it `[batch, width, dim]`."""
        raise NotImplementedError

    def change(self, query: Tensor, key: Tensor, value: Tensor, flags: Tensor, last: Tensor, scale: float) -> Tensor:
        """Return what is to be added to the attention's output, fp32 `[batch, rows, heads, head_dim]`.

        The arguments are those of `redistributed_attention`, queries and keys rotated.
        """
        raise NotImplementedError

    def change_macs(self, rows: int, keys: int, changed: int, width: int) -> int:
        """Return the multiply-accumulates of `change` for `rows` queries of all heads together `width` wide."""
        raise NotImplementedError
