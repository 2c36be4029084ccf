"""The stages of CATP inside the language model: demonstrations by the query's attention, the query image by the context."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import ParameterError, UnsupportedCallError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_int, check_number
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, LayerSignal, check_depth
from vlmprune.methods.needs import HIDDEN_AT_CUT, LAST_TOKEN_BEFORE_CUT, STILL_IMAGES, LayerNeed, Need
from vlmprune.methods.selection_macs import ScoredLayers

from .fastv import share_after_cut

# The paper's K and the depth of its model.
_LAYER, _DEPTH = 6, 32


@dataclass(frozen=True, kw_only=True)
class CATPStages(LayerMethod):
    """Drop tokens of the demonstrations after layer K, by the query's attention, and of the query image after the next layer.

    The images of a row but the last are demonstrations; the last one, with the text behind it, is the query. After layer
    K a token of a demonstration is scored by how much the attention of the last prompt token grew from layer K-1 to K
    (mean over heads; 0 where it fell), plus `lambda2` times the cosine of its hidden state to the mean of the query's
    tokens; the best of all demonstrations of a row stay. After layer K+1 a token of the query image is scored by the cosine
    to the mean of the demonstrations' remaining tokens and texts, or to that of the query's text where there are none.

    With `ratio`, `floor((1 - R) * N)` tokens stay, N those before CATP's first stage, of all demonstrations together and
    of the query image. With `keep`, the average over layers, what stays of the tokens that entered is solved for each.

    The defaults are the paper's K for 32 layers and its lambda2.

    Positions: original.

    Attributes:
        ratio: the paper's R, in [0, 1).
        layer: the paper's K, an int >= 1; 6 of 32, scaled with the depth, if not given.
        lambda2: weight of the cosine in the first cut.

    Source: stages 2a and 2b of "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context
    Learning", AAAI 2026, arXiv 2508.07871 (no official code).
    """

    ratio: float | None = None
    layer: int | None = None
    lambda2: float = 0.6

    name: ClassVar[str] = "catp_stages"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, LAST_TOKEN_BEFORE_CUT, HIDDEN_AT_CUT})
    symbols: ClassVar[Mapping[str, str]] = {"R": "ratio=R", "K": "layer=K"}
    is_stage: ClassVar[bool] = True
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layer is not None:
            check_int("layer", self.layer, 1)
        if self.ratio is not None:
            check_number("ratio", self.ratio, "[0, 1)", "the share of visual tokens that is removed")
        check_number("lambda2", self.lambda2, "[0, inf)")

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the two layers."""
        scored = self._scored_layer(layers)
        if isinstance(self.keep, float):
            for cut in (scored + 1, scored + 2):
                share_after_cut(self.keep, cut, layers)
        return (scored + 1, scored + 2)

    def reading_at(self, cut: int, layers: int) -> LayerNeed:
        """Attention and hidden states for the first cut, hidden states for the second."""
        return LAST_TOKEN_BEFORE_CUT if cut == self._scored_layer(layers) + 1 else HIDDEN_AT_CUT

    def layer_signals(self, layers: int) -> tuple[LayerSignal, ...]:
        """Ask for the attention one layer earlier."""
        return (LayerSignal("last_token_attention", self._scored_layer(layers) - 1),)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return both cuts; what an image loses, its neighbours tell."""
        if isinstance(self.keep, int) and self.keep < total:
            for cut in self.cut_layers(layers):
                share_after_cut(self.keep, cut, layers, total)
        return tuple(LayerCut(cut, None) for cut in self.cut_layers(layers))

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Cut the demonstrations of each row together, or the query images."""
        assert batch.hidden is not None
        queries = last_of_rows(batch.rows)
        first = batch.layer == self._scored_layer(batch.layers) + 1
        kept = [torch.arange(count, device=batch.hidden.device) for count in batch.counts]
        for query in queries:
            shots = [image for image, row in enumerate(batch.rows) if row == batch.rows[query] and image != query]
            if not first:
                scores, budget = self._of_query(batch, query, shots), batch.budgets[query]
                left = self._left(batch, [query]) if budget is None else budget
                kept[query] = segmented_topk(scores, (0, len(scores)), (left,))
            elif shots:
                scores = self._of_demonstrations(batch, query, shots)
                given = [budget for budget in (batch.budgets[shot] for shot in shots) if budget is not None]
                if len(given) == len(shots):
                    # Each has a number of its own.
                    offsets = tuple(accumulate((batch.counts[shot] for shot in shots), initial=0))
                    parts = segmented_topk(scores, offsets, given).split(given)
                    for shot, own in zip(shots, parts, strict=True):
                        kept[shot] = own
                    continue
                chosen = segmented_topk(scores, (0, len(scores)), (self._left(batch, shots),))
                alive = torch.zeros(len(scores), dtype=torch.bool, device=scores.device).index_fill(0, chosen, True)
                for shot, mine in zip(shots, alive.split([batch.counts[shot] for shot in shots]), strict=True):
                    kept[shot] = mine.nonzero().flatten()
        return Selection(torch.cat(kept), tuple(map(len, kept)))

    def own_macs(self, scored: ScoredLayers) -> int:
        """One cosine a token."""
        return sum(
            before * scored.dim
            for before, after in zip(scored.visual, scored.visual[1:], strict=False)
            if after < before
        )

    def _scored_layer(self, layers: int) -> int:
        layer = max(1, round(_LAYER * layers / _DEPTH)) if self.layer is None else self.layer
        if layers < 4:
            raise ParameterError(f"The language model has {layers} layers; 'catp' cuts twice and needs at least 4.")
        check_depth("layer", (layer + 2,), layers)
        return layer

    def _left(self, batch: LayerBatch, images: Sequence[int]) -> int:
        """Return how many tokens of `images`, which are cut together, stay."""
        alive = sum(batch.counts[image] for image in images)
        if self.keep is None:
            assert self.ratio is not None
            # Down, but for errors of the product.
            left = floor((1 - self.ratio) * sum(batch.totals[image] for image in images) + 1e-9)
        else:
            left = round(sum(self._share(batch, image) * batch.entered[image] for image in images))
        return min(alive, max(1, left))

    def _share(self, batch: LayerBatch, image: int) -> float:
        assert self.keep is not None
        if isinstance(self.keep, int) and self.keep >= batch.entered[image]:
            return 1.0
        return share_after_cut(self.keep, batch.layer, batch.layers, batch.entered[image])

    def _of_demonstrations(self, batch: LayerBatch, query: int, shots: Sequence[int]) -> Tensor:
        assert batch.hidden is not None
        assert batch.attention is not None
        earlier = batch.signals[self.layer_signals(batch.layers)[0]]
        spans = [slice(batch.offsets[shot], batch.offsets[shot + 1]) for shot in shots]
        row, hidden = batch.rows[query], batch.hidden[batch.rows[query]]
        # Which words of the row are the demonstrations': one whose image loses all tokens is not shown at the next cut.
        texts = torch.cat([batch.text[shot].next for shot in shots])
        batch.memory[row] = torch.searchsorted(row_text(batch, row), texts)
        asked = hidden[torch.cat([batch.columns[query], batch.text[query].after])]
        return demonstration_scores(
            torch.cat([batch.attention[span] for span in spans]),
            torch.cat([earlier[span] for span in spans]),
            batch.hidden[row, torch.cat([batch.columns[shot] for shot in shots])],
            asked,
            self.lambda2,
        )

    def _of_query(self, batch: LayerBatch, query: int, shots: Sequence[int]) -> Tensor:
        assert batch.hidden is not None
        row = batch.rows[query]
        if row in batch.memory:
            context = torch.cat([*(batch.columns[shot] for shot in shots), row_text(batch, row)[batch.memory[row]]])
        else:
            context = batch.text[query].after
        if not len(context):
            raise UnsupportedCallError(
                f"Row {row} has one image and no text behind it, and 'catp' scores by that text; allowed: a question behind the "
                "image, demonstrations before it, or a method that does not score by words."
            )
        return query_scores(batch.hidden[row, batch.columns[query]], batch.hidden[row, context])


def row_text(batch: LayerBatch, row: int) -> Tensor:
    """Return the columns of a row's text, int64, ascending."""
    assert batch.hidden is not None
    words = (
        torch.ones_like(batch.hidden[row, :, 0], dtype=torch.bool) if batch.valid is None else batch.valid[row].clone()
    )
    words[torch.cat([columns for other, columns in zip(batch.rows, batch.columns, strict=True) if other == row])] = (
        False
    )
    return words.nonzero().flatten()


def last_of_rows(rows: Sequence[int]) -> list[int]:
    """Return the last image of every row that has any."""
    return list({row: image for image, row in enumerate(rows)}.values())


def demonstration_scores(attention: Tensor, earlier: Tensor, tokens: Tensor, query: Tensor, lambda2: float) -> Tensor:
    """Return the scores of the demonstrations' tokens, fp32 `[tokens]`.

    Args:
        attention: fp32 `[tokens]`, of the last prompt token in layer K.
        earlier: the same in layer K-1.
        tokens: `[tokens, dim]`, their hidden states.
        query: `[queries, dim]`, those of all tokens of the query.
        lambda2: weight of the cosine.
    """
    mean = query.to(torch.float32).mean(0, keepdim=True)
    return (attention - earlier).clamp(min=0) + lambda2 * torch.cosine_similarity(
        tokens.to(torch.float32), mean, dim=-1
    )


def query_scores(tokens: Tensor, context: Tensor) -> Tensor:
    """Return the cosines of `tokens [tokens, dim]` to the mean of `context [others, dim]`, fp32 `[tokens]`."""
    mean = context.to(torch.float32).mean(0, keepdim=True)
    return torch.cosine_similarity(tokens.to(torch.float32), mean, dim=-1)
