"""TransPrune: the tokens that layers still move, and that the question attends to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.kernels.token_transition import token_transition
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_choice, check_number
from vlmprune.methods.layer_method import LayerBatch, LayerSignal
from vlmprune.methods.needs import STILL_IMAGES, TEXT_AT_CUT, Need
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.staged_method import StagedMethod, scaled_cuts, solve_shares, unreachable

# TransPrune-High, and the depth of its model.
_CUTS, _SHARES, _DEPTH = (7, 9, 12), (0.875, 0.625, 0.125), 32

Angle = Literal["signed", "absolute"]


@dataclass(frozen=True, kw_only=True)
class TransPrune(StagedMethod):
    """Drop visual tokens in stages inside the language model, by how much its layers move them and by the question's attention.

    A module (attention, MLP) moves a token by `|out| / |in|`, weighted with the softmax of `1 - cos(in, out)` over all
    tokens of the row; `in` is what the module gets after its norm, `out` what it gives before the residual. What the
    modules of the layers `accumulate` did is summed up (token transition variation), and so is the attention that a
    token gets from the text behind its image in the layer that is cut (softmax over the whole row, mean over heads and
    words). Each is divided by its sum over the image's tokens alive, and the sum of both is the score. The best stay,
    in position order.

    Either give `ratios` (and `layers`), or `keep`, the average over all layers, from which the ratios are solved: powers
    of the published ones, at `layers` or the published layers, scaled with the depth; where that is too much, the first
    cut moves to layer 1. The paper's setting (High) is `TransPrune(layers=(7, 9, 12), ratios=(0.875, 0.625, 0.125))`
    on 32 layers, an average of 0.41; without parameters `keep` is 0.25, which keeps less. The shares of TransPrune-Low
    are not published.

    An image behind an earlier turn is refused, because the transitions of that turn are gone. Text turns go on as with every
    method.

    Positions: as before the first layer, so 1-D ones close the gaps of what is dropped, as in the official code, and
    M-RoPE ids stay.

    Attributes:
        layers: 0-based layers at whose input tokens are dropped (the paper counts completed layers: the same numbers).
        ratios: share of the image's tokens that stays from each of these layers on, `int(N * ratio)`; never growing.
        allow_empty: whether an image may lose all tokens because `int(N * ratio)` is 0, as in the official code; else an error.
        accumulate: 0-based layers whose transitions count (each one less than in the paper, which counts from 1); by
            default from the one before the first cut to the one before the last, as published.
        alpha: weight of the transitions beside the attention, in [0, 1]; 0.5 as published.
        angle: "signed" for `1 - cos` as in the official code, "absolute" for `1 - |cos|` as in the paper.

    Source: "TransPrune: Token Transition Pruning for Efficient Large Vision-Language Model", CVPR 2026, arXiv 2507.20630.
    The paper weighs transitions and attention as they are, the official code divides each by its sum first, as here. The
    official code serves one row, in the model's dtype, and computes transitions again for every generated token; here
    once, row by row, in fp32.
    """

    accumulate: tuple[int, ...] | None = None
    alpha: float = 0.5
    angle: Angle = "signed"

    name: ClassVar[str] = "transprune"
    reads_whole_row = True
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TEXT_AT_CUT})
    symbols: ClassVar[Mapping[str, str]] = {
        "pruning_layers": "layers=",
        "accumulating_layers": "accumulate=, each one less",
        "image_token_ratio_list": "ratios=, without its leading 1.0",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.accumulate is not None:
            object.__setattr__(self, "accumulate", _check_accumulate(self.accumulate))
        check_number("alpha", self.alpha, "[0, 1]", "the weight of the transitions")
        check_choice("angle", self.angle, ("signed", "absolute"))

    def default_cuts(self, layers: int, stages: int) -> tuple[int, ...]:
        """Return the published cuts, scaled; other numbers of stages have none."""
        if stages != len(_CUTS):
            raise ParameterError(
                f"ratios={self.ratios} has {stages} stages, and layers is not given; allowed: {len(_CUTS)} ratios, or a layer "
                "for each."
            )
        return scaled_cuts(_CUTS, _DEPTH, layers)

    def possible_cuts(self, layers: int) -> tuple[int, ...]:
        """Return the published cuts, scaled, and layer 1."""
        return tuple(sorted({1, *scaled_cuts(_CUTS, _DEPTH, layers)}))

    def solved_stages(self, share: float, layers: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Return the published shares to the power that gives the average."""
        return transprune_stages(share, layers, self.layers)

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers of all stages."""
        cuts = super().cut_layers(layers)
        if self.accumulate is not None and self.accumulate[0] >= cuts[0]:
            raise ParameterError(
                f"accumulate={self.accumulate} begins at layer {self.accumulate[0]}, but tokens are dropped at the input of "
                f"layer {cuts[0]} already; allowed: a first layer of 0 to {cuts[0] - 1}; nearest: {cuts[0] - 1}."
            )
        return cuts

    def layer_signals(self, layers: int) -> tuple[LayerSignal, ...]:
        """Ask for what the modules of the layers `accumulate` do."""
        cuts = self.cut_layers(layers)
        watched = range(cuts[0] - 1, cuts[-1]) if self.accumulate is None else self.accumulate
        return tuple(LayerSignal(kind, layer) for layer in watched if layer < cuts[-1] for kind in ("attention", "mlp"))

    def observe(self, signal: LayerSignal, inputs: Tensor, outputs: Tensor, valid: Tensor | None) -> Tensor:
        """Return how much a module moved every token, fp32 `[batch, width]`."""
        return transition_variation(inputs, outputs, valid, self.angle)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Take the `budgets[i]` highest scores of each image."""
        budgets = tuple(budget or 0 for budget in batch.budgets)
        scores = self.score(batch)
        return Selection(segmented_topk(scores, batch.offsets, budgets), budgets, scores=scores)

    def score(self, batch: LayerBatch) -> Tensor:
        """Return the scores of the tokens alive, fp32 `[tokens]`."""
        attention = batch.attention_of([text.after for text in batch.text], reduce_queries="mean")
        scores = []
        for image, (seen, begin) in enumerate(zip(attention, batch.offsets, strict=False)):
            span, first = slice(begin, begin + len(seen)), self._first_layer(batch, image)
            moved = torch.stack([values[span] for signal, values in batch.signals.items() if signal.layer >= first])
            scores.append(transprune_scores(moved.sum(0), seen, self.alpha))
        return torch.cat(scores)

    def _first_layer(self, batch: LayerBatch, image: int) -> int:
        """Return the first layer whose transitions count; with `keep` as a number the cuts depend on an image's size."""
        if self.accumulate is not None or not isinstance(self.keep, int):
            return 0
        return self.schedule(batch.entered[image], batch.layers)[0].layer - 1

    def own_macs(self, scored: ScoredLayers) -> int:
        """Nothing beyond the attention: the products of what enters and leaves a module are one a channel, as norms are."""
        return 0


def transition_variation(inputs: Tensor, outputs: Tensor, valid: Tensor | None, angle: Angle = "signed") -> Tensor:
    """Return `|out| / |in|` weighted with the softmax of `1 - cos(in, out)` over each row's tokens, fp32 `[batch, tokens]`.

    Args:
        inputs: `[batch, tokens, dim]`, what a module gets.
        outputs: `[batch, tokens, dim]`, what it gives.
        valid: bool `[batch, tokens]`, False at padding, which weighs nothing; None if there is none.
        angle: "absolute" for `1 - |cos(in, out)|`.
    """
    ratio, cosine = (
        part.view(inputs.shape[:2]) for part in token_transition(inputs.flatten(0, 1), outputs.flatten(0, 1))
    )
    turn = 1 - (cosine.abs() if angle == "absolute" else cosine)
    if valid is None:
        return ratio * turn.softmax(-1)
    weight = turn.masked_fill(~valid, -torch.inf).softmax(-1)
    return torch.where(valid, ratio * weight, 0.0)


def transprune_scores(variation: Tensor, attention: Tensor, alpha: float = 0.5) -> Tensor:
    """Return the scores of one image's tokens, fp32 `[tokens]`: both parts divided by their sum, and weighed.

    Args:
        variation: fp32 `[tokens]`, summed over modules and layers.
        attention: fp32 `[tokens]`, from the text.
        alpha: weight of `variation`; at 0.5 both count 1.
    """
    moved, seen = (part / (part.sum() + 1e-8) for part in (variation, attention))
    return 2 * alpha * moved + 2 * (1 - alpha) * seen


@lru_cache(maxsize=1024)
def transprune_stages(
    share: float, layers: int, cuts: tuple[int, ...] | None = None
) -> tuple[tuple[int, ...], tuple[float, ...]]:
    """Return cuts and cumulative shares whose average over `layers` layers is `share`; rule in `TransPrune`.

    Raises:
        BudgetError: the average cannot be reached; names the lowest one that can.
    """
    published = scaled_cuts(_CUTS, _DEPTH, layers)
    for candidate in (cuts,) if cuts is not None else (published, (1, *(cut for cut in published[1:] if cut > 1))):
        # Where there is no room for all stages, or for more of them, the last share counts.
        base = _SHARES[-len(candidate) :] if len(candidate) <= len(_SHARES) else _stretched(len(candidate))
        if share >= 1:
            return candidate, (1.0,) * len(candidate)
        # x = 1 keeps everything and x = 0 nothing: the power is 1 / x - 1.
        solved = solve_shares(share, layers, candidate, lambda x, base=base: _powers(base, x))  # type: ignore[misc]
        if solved is not None:
            return candidate, _powers(base, solved)
    raise unreachable(share, layers, cuts[0] if cuts is not None else 1)


def _powers(shares: Sequence[float], x: float) -> tuple[float, ...]:
    return tuple(share ** (1 / x - 1) if x > 0 else 0.0 for share in shares)


def _stretched(stages: int) -> tuple[float, ...]:
    """Return shares for more stages than the published ones: even steps down to the last."""
    return tuple(1 - (1 - _SHARES[-1]) * (stage + 1) / stages for stage in range(stages))


def _check_accumulate(layers: Sequence[int]) -> tuple[int, ...]:
    allowed = "ints >= 0 in rising order (0-based layers whose transitions count)"
    if isinstance(layers, (str, int, float)) or not layers:
        raise ParameterError(f"accumulate={layers!r}; allowed: {allowed}.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int) or layer < 0:
            raise ParameterError(f"accumulate holds {layer!r}; allowed: {allowed}.")
    if list(layers) != sorted(set(layers)):
        raise ParameterError(f"accumulate={tuple(layers)}; allowed: {allowed}; nearest: {tuple(sorted(set(layers)))}.")
    return tuple(layers)
