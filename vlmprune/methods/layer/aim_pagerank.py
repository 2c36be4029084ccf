"""The second stage of AIM: fewer tokens in every layer, by PageRank on its attention."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.kernels.attention_pagerank import attention_pagerank
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_flag, check_int, check_number
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth
from vlmprune.methods.needs import ALL_TOKENS_BEFORE_CUT, STILL_IMAGES, Need
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.staged_method import unreachable

# The first and the last layer of the published schedule, and the depth of its model.
_FIRST, _LAST, _DEPTH = 14, 22, 28


@dataclass(frozen=True, kw_only=True)
class AIMPageRank(LayerMethod):
    """Drop visual tokens at layer after layer, down to none, by the votes that tokens give each other.

    A token's importance is the root mean square over heads of its votes after `iterations` rounds of `p <- p P`; `P` is
    the softmax of the logits of the layer before the cut, divided by `temperature`, and votes are equal at first. All
    tokens of the row vote, text too, and only visual tokens are dropped. An image behind an earlier turn is refused: the
    queries of that turn, its votes, are gone. Text turns go on as with every method.

    From layer `l1` on, `layers=(l1, l2)`, the input of layer `l` has the share `1 - (l - l1) / (l2 - l1)` of the tokens that
    entered, `int(N * share)`; from `l2` on there is none. With `keep`, the average over layers, the span from `l1` to
    `l2` is as long as in the paper and lies where that average is met (it may begin before the first layer or end after
    the last), and counts are rounded half to even.

    The defaults are the paper's schedule for 28 layers.

    Positions: original, as in the official code.

    Attributes:
        layers: `(l1, l2)`; by default those of the paper, (14, 22) of 28 layers, scaled with the depth.
        temperature: divides the logits.
        iterations: rounds of voting.
        faithful: tokens stay in the sequence and are masked as keys, as in the official code: they go on voting, and
            nothing gets faster.

    Source: the inner stage of "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025, arXiv
    2412.03248. The paper removes tokens, the official code only masks them; a token that was removed no longer votes,
    so that here and there another one is kept.
    """

    layers: tuple[int, int] | None = None
    temperature: float = 0.1
    iterations: int = 5
    faithful: bool = False

    name: ClassVar[str] = "aim_pagerank"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, ALL_TOKENS_BEFORE_CUT})
    is_stage: ClassVar[bool] = True
    positions = "original"
    reads_whole_row = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", _check_span(self.layers))
            if self.keep is not None:
                raise ParameterError(
                    f"keep={self.keep!r} and layers={self.layers!r} both set the budget; give one of them. "
                    "keep is the average over layers, layers is where tokens begin to go and where none is left."
                )
        check_number("temperature", self.temperature, "(0, inf)")
        check_int("iterations", self.iterations, 1)
        check_flag("faithful", self.faithful)

    @property
    def masks(self) -> bool:
        """Whether tokens are only masked."""
        return self.faithful

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return every layer that may lose tokens."""
        check_depth("layers", (), layers)
        if isinstance(self.keep, int):
            return tuple(range(1, layers))
        return falling(self._shares(layers) if self.keep is None else solved_shares(self.keep, layers))

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the cuts of an image of `total` tokens."""
        if self.keep is None:
            return tuple(LayerCut(layer, int(total * self._shares(layers)[layer])) for layer in self.cut_layers(layers))
        share = self.keep / total if isinstance(self.keep, int) else self.keep
        if share >= 1:
            return ()
        shares = solved_shares(share, layers)
        return tuple(LayerCut(layer, round(total * shares[layer])) for layer in falling(shares))

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Take the `budgets[i]` most important tokens of each image."""
        importance = self._importance(batch)
        scores = torch.cat([importance[row, columns] for row, columns in zip(batch.rows, batch.columns, strict=True)])
        budgets = tuple(budget or 0 for budget in batch.budgets)
        return Selection(aim_keep(scores, batch.offsets, budgets), budgets)

    def own_macs(self, scored: ScoredLayers) -> int:
        """The attention of all tokens, once for all rounds; the rounds themselves are sums, one product a weight and round."""
        pairs = sum(
            (before + scored.text) ** 2
            for before, after in zip(scored.visual, scored.visual[1:], strict=False)
            if after < before
        )
        return pairs * scored.heads * (self.iterations + scored.head_dim)

    def _importance(self, batch: LayerBatch) -> Tensor:
        """Return the importance of every token, fp32 `[batch, width]`."""
        probed = batch.probed
        assert probed is not None
        assert probed.query is not None
        rows, width = probed.query.shape[:2]
        key = probed.key[:, -width:]
        seen = None if probed.valid is None else probed.valid[:, -width:]
        # What is masked as a key still votes where nothing was removed.
        voters = batch.memory.setdefault("voters", seen) if self.faithful else seen
        return pagerank_importance(
            probed.query.flatten(0, 1),
            key.flatten(0, 1),
            [row * width for row in range(rows + 1)],
            probed.scale / self.temperature,
            self.iterations,
            None if seen is None else seen.flatten(),
            None if voters is None else voters.flatten(),
        ).view(rows, width)

    def _shares(self, layers: int) -> tuple[float, ...]:
        first, last = self.layers or (round(_FIRST * layers / _DEPTH), round(_LAST * layers / _DEPTH))
        return linear_shares(first, max(last, first + 1) - first, layers)


def pagerank_importance(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Sequence[int],
    scale: float,
    iterations: int,
    seen: Tensor | None = None,
    voters: Tensor | None = None,
) -> Tensor:
    """Return the importance of packed tokens, fp32 `[tokens]`.

    Args:
        query: `[tokens, heads, head_dim]`, rotary positions applied.
        key: `[tokens, kv_heads, head_dim]`.
        cu_seqlens: bounds of the rows.
        scale: of the logits, divided by the temperature.
        iterations: rounds of voting.
        seen: bool `[tokens]`, the keys that get votes; None for all.
        voters: bool `[tokens]`, the tokens that vote at first; None for all.
    """
    return attention_pagerank(
        query, key, cu_seqlens, iterations, scale=scale, causal=True, seen=seen, start=voters, reduce_heads="rms"
    )


def aim_keep(importance: Tensor, offsets: Sequence[int], budgets: Sequence[int]) -> Tensor:
    """Return the local indices of the `budgets[i]` most important tokens in each segment, ascending."""
    return segmented_topk(importance, offsets, budgets)


def falling(shares: Sequence[float]) -> tuple[int, ...]:
    """Return the layers that have a smaller share than the one before."""
    return tuple(layer for layer, (before, share) in enumerate(pairwise(shares), 1) if share < before)


@lru_cache(maxsize=1024)
def linear_shares(first: float, span: float, layers: int) -> tuple[float, ...]:
    """Return the share that the input of every layer has: 1 up to layer `first`, falling to 0 at `first + span`."""
    return (1.0, *(min(1.0, max(0.0, 1 - (layer - first) / span)) for layer in range(1, layers)))


@lru_cache(maxsize=1024)
def solved_shares(share: float, layers: int) -> tuple[float, ...]:
    """Return the shares of every layer, as steep as in the paper, whose average over layers is `share`.

    Raises:
        BudgetError: the first layer alone exceeds the average.
    """
    if share >= 1:
        return (1.0,) * layers
    if share * layers <= 1:
        raise unreachable(share, layers, 1)
    span = max(1, round((_LAST - _FIRST) * layers / _DEPTH))
    low, high = float(-span), float(layers)
    for _ in range(60):
        middle = (low + high) / 2
        below = sum(linear_shares(middle, span, layers)) < share * layers
        low, high = (middle, high) if below else (low, middle)
    return linear_shares(round(high, 9), span, layers)


def _check_span(layers: object) -> tuple[int, int]:
    allowed = "two ints 0 <= l1 < l2, the last layer with all tokens and the first without any"
    if not isinstance(layers, (tuple, list)) or len(layers) != 2:
        raise ParameterError(f"layers={layers!r}; allowed: {allowed}.")
    for layer in layers:
        if isinstance(layer, bool) or not isinstance(layer, int):
            raise ParameterError(f"layers holds {layer!r}; allowed: {allowed}.")
    first, last = layers
    if not 0 <= first < last:
        raise ParameterError(
            f"layers={tuple(layers)!r}; allowed: {allowed}; nearest: {(max(0, first), max(0, first) + 1)}."
        )
    return first, last
