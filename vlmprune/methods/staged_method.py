"""The base of the methods that drop inside the language model in stages, to shares that are given or solved."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import ceil

from ..errors import BudgetError, ParameterError
from .checks import check_flag, check_number
from .layer_method import LayerCut, LayerMethod, check_depth, check_layers


@dataclass(frozen=True, kw_only=True)
class StagedMethod(LayerMethod):
    """A method that keeps shares of an image's tokens, from layer to layer fewer.

    Either `ratios` (and `layers`) say which, or `keep`, the average over all layers, from which both are solved.

    Attributes:
        layers: 0-based layers at whose input tokens are dropped.
        ratios: share of the image's tokens that stays from each of these layers on, `int(N * ratio)`; never growing.
        allow_empty: whether an image may lose all tokens because `int(N * ratio)` is 0, as in official codes; else an error.
    """

    layers: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    allow_empty: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("allow_empty", self.allow_empty)
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        if self.ratios is None:
            if self.keep is None:
                object.__setattr__(self, "keep", 0.25)
            return
        if self.keep is not None:
            raise ParameterError(
                f"keep={self.keep!r} and ratios={self.ratios!r} both set the budget; give one of them. "
                "keep is the average over layers, ratios are the shares from each stage on."
            )
        object.__setattr__(self, "ratios", check_ratios(self.ratios))
        if self.layers is not None and len(self.layers) != len(self.ratios):
            raise ParameterError(
                f"layers={self.layers} has {len(self.layers)} stages, ratios={self.ratios} has {len(self.ratios)}; "
                "allowed: one ratio a layer."
            )

    def default_cuts(self, layers: int, stages: int) -> tuple[int, ...]:
        """Return the cuts of `stages` given ratios without given layers."""
        raise NotImplementedError

    def possible_cuts(self, layers: int) -> tuple[int, ...]:
        """Return every cut that `solved_stages` may give for some share, ascending."""
        raise NotImplementedError

    def solved_stages(self, share: float, layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return cuts and shares whose average over `layers` layers is `share`, a number in (0, 1]; with `layers`, at these.

        Raises:
            BudgetError: there are none (`unreachable` makes it).
        """
        raise NotImplementedError

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers of all stages."""
        if self.layers is not None:
            check_depth("layers", self.layers, layers)
        if self.ratios is not None:
            cuts = self.layers or self.default_cuts(layers, len(self.ratios))
            if len(cuts) != len(self.ratios):
                raise ParameterError(
                    f"ratios={self.ratios} has {len(self.ratios)} stages, but {layers} layers leave room for {len(cuts)}."
                )
            return cuts
        check_depth("layers", (), layers)
        if isinstance(self.keep, float):
            return self.solved_stages(self.keep, layers)[0]
        return self.layers or self.possible_cuts(layers)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the stages of an image of `total` tokens."""
        if self.ratios is not None:
            counts = stage_counts(total, self.ratios)
            cuts = self.cut_layers(layers)
            for cut, ratio, count in zip(cuts, self.ratios, counts, strict=True):
                if count == 0 and not self.allow_empty:
                    raise BudgetError(
                        f"ratio {ratio} at layer {cut} keeps int({total} * {ratio}) = 0 of an image's {total} visual tokens; "
                        f"allowed: at least {ceil(1e5 / total) / 1e5:g} here, or allow_empty=True to drop all of them."
                    )
            return tuple(LayerCut(cut, count) for cut, count in zip(cuts, counts, strict=True))
        assert self.keep is not None
        share = self.keep / total if isinstance(self.keep, int) else self.keep
        if share >= 1:
            return ()
        try:
            cuts, shares = self.solved_stages(share, layers)
        except BudgetError:
            if isinstance(self.keep, float):
                raise
            first = self.layers[0] if self.layers is not None else 1
            raise BudgetError(
                f"keep={self.keep} of {total} visual tokens, averaged over {layers} layers, cannot be reached: all tokens pass "
                f"the first {first} layers; nearest: keep={first * total // layers + 1}."
            ) from None
        return tuple(LayerCut(cut, max(1, round(total * part))) for cut, part in zip(cuts, shares, strict=True))


def stage_counts(total: int, ratios: Sequence[float]) -> tuple[int, ...]:
    """Return the tokens left of `total` after each stage, `int(total * ratio)` as in the official code; 0 is possible."""
    return tuple(int(total * ratio) for ratio in ratios)


def check_ratios(ratios: Sequence[float]) -> tuple[float, ...]:
    """Return `ratios` as a tuple of floats.

    Raises:
        ParameterError: not numbers in [0, 1], or growing.
    """
    allowed = "numbers in [0, 1] that never grow, cumulative shares of the image's tokens"
    if isinstance(ratios, (str, int, float)) or not ratios:
        raise ParameterError(f"ratios={ratios!r}; allowed: {allowed}.")
    for index, ratio in enumerate(ratios):
        check_number(f"ratios[{index}]", ratio, "[0, 1]", "cumulative shares of the image's tokens that never grow")
    for before, after in pairwise(ratios):
        if after > before:
            raise ParameterError(
                f"ratios={tuple(ratios)}: {after} follows {before}, but dropped tokens do not come back; allowed: {allowed}; "
                f"nearest: {tuple(sorted(ratios, reverse=True))}."
            )
    return tuple(float(ratio) for ratio in ratios)


def scaled_cuts(cuts: Sequence[int], depth: int, layers: int) -> tuple[int, ...]:
    """Return `cuts`, made for `depth` layers, for `layers`: rising, at least 1; the last are left out where there is no room."""
    scaled: list[int] = []
    for cut in cuts:
        scaled.append(max(round(cut * layers / depth), scaled[-1] + 1 if scaled else 1))
    return tuple(cut for cut in scaled if cut < layers)


def solve_shares(
    share: float, layers: int, cuts: Sequence[int], shares: Callable[[float], tuple[float, ...]]
) -> float | None:
    """Find x in (0, 1] for which the average over layers of `shares(x)`, rising in x, is `share`; None if there is none."""
    ends = (*cuts[1:], layers)

    def average(x: float) -> float:
        spans = zip(cuts, ends, shares(x), strict=True)
        return (cuts[0] + sum((end - cut) * part for cut, end, part in spans)) / layers

    if not average(0.0) < share <= average(1.0):
        return None
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if average(middle) < share else (low, middle)
    return high


def unreachable(share: float, layers: int, first: int) -> BudgetError:
    """Return the error of an average that `first` layers with all tokens alone exceed."""
    nearest = (int(first / layers * 100 + 1e-9) + 1) / 100
    return BudgetError(
        f"keep={share:g}, averaged over {layers} layers, cannot be reached: all visual tokens pass the first "
        f"{first} layers, so the average stays above {first / layers:.4g}; nearest: keep={nearest}."
    )
