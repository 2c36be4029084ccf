"""The second stage of ToDRE: all visual tokens leave late layers in which text and image hardly look at each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_number
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, ProbedLayer, check_depth, check_layers
from vlmprune.methods.needs import ALL_TOKENS_BEFORE_CUT, Need
from vlmprune.methods.selection_macs import ScoredLayers

SYSTEM, VISUAL, TEXT = 1, 2, 3

# Query rows whose attention is held at a time.
_BLOCK = 256


@dataclass(frozen=True, kw_only=True)
class ToDRERelevance(LayerMethod):
    """Drop all visual tokens of a row at one late layer if cross-modal attention has faded there, else keep them all.

    In the layer before the cut two shares are measured, summed over heads and rows: of the text's attention that falls on visual
    tokens, and of the visual tokens' attention that falls on text. Both below `tau`: the visual tokens leave. Text is what
    follows the first visual token of a row, the rest counts as system prompt. The decision waits for the device once a prefill.

    The defaults are the paper's (7L/8, tau 0.1), which does not say how 7L/8 is rounded.

    Positions: original; the paper does not say. Text behind a dropped image stays where it was, as in the earlier layers' caches.

    Attributes:
        layer: the paper's l, 0-based layer at whose input the tokens are dropped; by default `floor(7L / 8)`.
        tau: threshold of both shares, in [0, 1].

    Source: stage 2 of "ToDRE: Effective Visual Token Pruning via Token Diversity and Task Relevance", arXiv 2505.18757v2 (no
    official code).
    """

    layer: int | None = None
    tau: float = 0.1

    name: ClassVar[str] = "todre_relevance"
    needs: ClassVar[frozenset[Need]] = frozenset({ALL_TOKENS_BEFORE_CUT})
    symbols: ClassVar[Mapping[str, str]] = {"l": "layer="}
    is_stage: ClassVar[bool] = True
    positions = "original"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None:
            raise ParameterError(
                f"keep={self.keep!r}: the relevance test keeps all visual tokens or none; leave keep unset."
            )
        if self.layer is not None:
            check_layers("layer", (self.layer,))
        check_number("tau", self.tau, "[0, 1]")

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the one layer."""
        cut = max(1, 7 * layers // 8) if self.layer is None else self.layer
        check_depth("layer", (cut,), layers)
        return (cut,)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the one cut, whose size only the attention tells."""
        return (LayerCut(self.cut_layers(layers)[0], None),)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Keep or drop the images of each row together."""
        assert batch.probed is not None
        text_to_visual, visual_to_text = relevance_shares(batch.probed)
        irrelevant = ((text_to_visual < self.tau) & (visual_to_text < self.tau)).tolist()
        counts = tuple(0 if irrelevant[row] else count for row, count in zip(batch.rows, batch.counts, strict=True))
        device = batch.probed.key.device
        kept = [torch.arange(count, device=device) for count in counts]
        return Selection(torch.cat(kept), counts)

    def own_macs(self, scored: ScoredLayers) -> int:
        """Nothing beyond the attention."""
        return 0


def relevance_shares(probed: ProbedLayer) -> tuple[Tensor, Tensor]:
    """Return the text's share of attention on visual tokens and the visual tokens' on text, fp32 `[batch]` each.

    Attention is causal and summed over heads and rows; a row without text or visual tokens gives 0.
    """
    assert probed.query is not None
    assert probed.kinds is not None
    batch, tokens = probed.query.shape[:2]
    keys = probed.key.shape[1]
    past = keys - tokens
    own = probed.kinds[:, past:]
    shares = []
    for source, target in ((TEXT, VISUAL), (VISUAL, TEXT)):
        hit = probed.key.new_zeros(batch, dtype=torch.float32)
        everything = torch.zeros_like(hit)
        picked = (own == source).any(0).nonzero().flatten()
        if source == VISUAL and picked.numel():
            # Causal: visual tokens see only the text before them; without any, their share is 0 and no attention is needed.
            sees_text = (own == TEXT).cumsum(1).gt(0) & (own == VISUAL)
            if not bool(sees_text.any()):
                picked = picked[:0]
        for rows in picked.split(_BLOCK):
            seen = (torch.arange(keys, device=hit.device) <= rows[:, None] + past) & (probed.kinds > 0)[:, None]
            attention = row_attention(probed.query[:, rows], probed.key, scale=probed.scale, mask=seen, reduce="sum")
            attention = attention * (own[:, rows] == source)[..., None]
            hit += (attention * (probed.kinds == target)[:, None]).sum((1, 2))
            everything += attention.sum((1, 2))
        shares.append(hit / everything.clamp(min=torch.finfo(torch.float32).tiny))
    return shares[0], shares[1]
