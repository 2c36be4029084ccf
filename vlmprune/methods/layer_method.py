"""The base of the methods that drop visual tokens between layers of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal, NamedTuple

from torch import Tensor

from ..budget import check_keep
from ..errors import ParameterError
from .base import Method, Site
from .batch import Selection, TowerFacts, VisionSignal
from .layer_batch import LayerBatch as LayerBatch
from .layer_batch import LayerSignal as LayerSignal
from .layer_batch import ProbedLayer as ProbedLayer
from .layer_batch import TextSpans as TextSpans
from .needs import LAST_TOKEN_AT_CUT, STILL_IMAGES, LayerNeed, Need
from .selection_macs import ScoredLayers


class LayerCut(NamedTuple):
    """One place where an image loses visual tokens.

    Attributes:
        layer: 0-based layer at whose input the tokens are dropped.
        tokens: visual tokens of the image that stay; None if only the scores tell.
    """

    layer: int
    tokens: int | None


@dataclass(frozen=True, kw_only=True)
class LayerMethod(Method):
    """A method that drops visual tokens inside the language model.

    Attributes:
        keep: visual tokens averaged over the layers of the language model, as a share of those that enter it (a float in
            (0, 1]) or a number per image (an int); None where other parameters fix it.
        keep_positions: whether two fifths of what each stage keeps are the tokens that carry position, by the rule of `IVCPrune`,
            and the method chooses the others. Positions are then "original" unless `apply(..., positions=)` says otherwise.
        positions: whether positions close the gaps of what is dropped between layers ("compact"), keep them ("original"),
            or do as before the first layer (None); a class attribute.
        reads_whole_row: whether scores depend on what every token of the row does in this call, so that an image behind an
            earlier turn, of which a cache holds keys and values alone, is refused; a class attribute.
    """

    keep_positions: bool = False

    site: ClassVar[Site] = "layer"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, LAST_TOKEN_AT_CUT})
    positions: ClassVar[Literal["compact", "original"] | None] = None
    reads_whole_row: ClassVar[bool] = False

    def __post_init__(self) -> None:
        if self.keep is not None:
            object.__setattr__(self, "keep", check_keep(self.keep))

    @property
    def masks(self) -> bool:
        """Whether dropped tokens stay in the sequence, unseen as keys: nothing gets faster, and nobody merges."""
        return False

    @property
    def reading(self) -> LayerNeed:
        """What the method reads of the language model, the one such row of its needs."""
        (reading,) = (need for need in self.needs if isinstance(need, LayerNeed))
        return reading

    def reading_at(self, cut: int, layers: int) -> LayerNeed:
        """Return what is read for the cut at the input of layer `cut`, in a language model of `layers` layers."""
        return self.reading

    def layer_signals(self, layers: int) -> tuple[LayerSignal, ...]:
        """Return what is read in layers before the cuts, of a language model of `layers` layers; nothing by default."""
        return ()

    def observe(self, signal: LayerSignal, inputs: Tensor, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Return the value of a signal of kind "attention" or "mlp" for every token, fp32 `[batch, width]`.

        Args:
            signal: which one.
            inputs: what the module got, `[batch, width, dim]`.
            outputs: what it gave, before the residual is added, `[batch, width, dim]`.
            valid: bool `[batch, width]`, False at padding; None if there is none.
        """
        raise NotImplementedError

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Return what `select_at_layer` reads of the vision tower; nothing by default."""
        return ()

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return every layer at whose input this method may drop tokens in a language model of `layers` layers, ascending.

        Raises:
            ParameterError: a layer does not exist.
            BudgetError: `keep` cannot be reached, whatever the image.
        """
        raise NotImplementedError

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return where an image of `total` visual tokens is cut, and to how many tokens.

        Raises:
            BudgetError: the budget cannot be reached for an image of that size.
        """
        raise NotImplementedError

    def trims_cache(self, layers: int) -> int | None:
        """Return the first layer whose KV cache holds, after the prefill, only what is left behind the last cut; None for none.

        Each layer keeps the positions that its keys have, whatever `positions` says.
        """
        return None

    @property
    def counts_by_cache(self) -> bool:
        """Whether tokens that follow a trimmed cache count from the positions of the last cut in all its layers."""
        return False

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Choose the tokens of every image in `batch`."""
        raise NotImplementedError

    def own_macs(self, scored: ScoredLayers) -> int | None:
        """Return the multiply-accumulates of `select_at_layer` beyond the attention that it needs; None if not declared."""
        return None


def check_layers(name: str, cuts: Sequence[int]) -> tuple[int, ...]:
    """Return `cuts` as a tuple of ints.

    Raises:
        ParameterError: not ints, below 1, or out of order.
    """
    allowed = "ints >= 1 in rising order (tokens are dropped at the input of that 0-based layer)"
    if isinstance(cuts, (str, int, float)) or not cuts:
        raise ParameterError(f"{name}={cuts!r}; allowed: {allowed}.")
    for cut in cuts:
        if isinstance(cut, bool) or not isinstance(cut, int) or cut < 1:
            raise ParameterError(f"{name} holds {cut!r}; allowed: {allowed}.")
    for before, after in pairwise(cuts):
        if after <= before:
            raise ParameterError(
                f"{name}={tuple(cuts)}: stage at layer {after} follows the one at layer {before}; allowed: {allowed}; "
                f"nearest: {tuple(sorted(set(cuts)))}."
            )
    return tuple(cuts)


def check_depth(name: str, cuts: Sequence[int], layers: int) -> None:
    """Raise ParameterError if one of `cuts` lies beyond the last layer of a language model of `layers` layers."""
    if layers < 2:
        raise ParameterError(f"The language model has {layers} layer; dropping tokens between layers needs at least 2.")
    for cut in cuts:
        if cut >= layers:
            raise ParameterError(
                f"{name} holds {cut}, but the language model has {layers} layers; allowed: 1 to {layers - 1}; "
                f"nearest: {layers - 1}."
            )
