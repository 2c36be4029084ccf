"""CrossGET without its training: merges on the complete graph, by what the CLS token looks at."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_choice, check_int
from vlmprune.methods.encoder.crossget_match import (
    complete_graph_match,
    ensemble,
    ensemble_weights,
    query_importance,
)
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Reading, Reduction
from vlmprune.methods.shared.merge_schedule import counts_after
from vlmprune.methods.shared.tower_attention import attention_given, attention_received, mean_keys
from vlmprune.methods.shared.tower_plan import leaving

Variant = Literal["llava", "clip", "matching"]


@dataclass(frozen=True, kw_only=True)
class CrossGET(EncoderMethod):
    """Merge r tokens in every block, between attention and MLP, those that resemble another one most and matter least.

    A token goes if its importance minus its highest cosine (keys, mean over heads) to a token of lower rank is low, to the most
    similar of those that stay; the pair is weighted by the softmax of its importances. Tokens stay in the order of their
    positions. Attention counts a token by its size. A copy of the CLS token, the cross token, stands behind the patches and
    takes part in the attention; neither ever merges. Importance is the mean attention of all other tokens plus that of the
    cross token (`variant="llava"`), or the cosine of a token's key to the cross token's query ("clip").

    A tower without CLS token gets no cross token: importance is the mean attention received, by our choice; the
    variant "clip" is refused there by nothing to compare with and takes it too.

    Source: "CrossGET: Cross-Guided Ensemble of Tokens for Accelerating Vision-Language Transformers", arXiv 2305.17455. This is
    its training-free part: the cross tokens that the paper learns are zero, so that the cross token is no more than a second
    CLS token, and none of the paper's figures, of fine-tuned models, holds here. As in the official code several sources of
    one token are added with weights that do not sum to one. Which of two tokens that are each other's nearest goes is
    left to `torch.argsort`, as there. The official code gives the cross token to the language model as the last visual token;
    here it stays in the tower.

    Attributes:
        r: tokens that go in every block, instead of `keep`; 13 if neither is given, as officially for LLaVA-1.5 (277 of 576 leave
            the tower, besides the cross token).
        variant: "llava", "clip", or "matching" for no importance: weights of 1/2, the paper's matching alone.
    """

    r: int | None = None
    variant: Variant = "llava"

    name: ClassVar[str] = "crossget"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None and self.r is None:
            object.__setattr__(self, "r", 13)
        if self.r is not None:
            if self.keep is not None:
                raise ParameterError(f"keep={self.keep!r} and r={self.r!r} both say how many tokens merge; give one.")
            check_int("r", self.r, 0)
        check_choice("variant", self.variant, get_args(Variant))

    @property
    def reads(self) -> frozenset[Reading]:
        """Keys, and queries for the importance."""
        return frozenset({"keys"} if self.variant == "matching" else {"keys", "queries"})

    @property
    def proportional(self) -> bool:
        """Attention counts tokens by size."""
        return True

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return what leaves each block with `r` fewer, or with about equally many fewer for `keep`."""
        blocks = tower.feature_layer + 1
        if self.r is not None:
            return counts_after(patches, [self.r] * blocks)
        assert self.keep is not None
        return leaving(self.keep, self.output == "merged", patches, blocks)

    def trailing(self, tower: TowerFacts) -> int:
        """The cross token."""
        return int(tower.has_cls)

    def append(self, hidden: Tensor, tower: TowerFacts) -> Tensor | None:
        """Put a copy of the CLS token behind the patches."""
        return hidden[:, :1] if tower.has_cls else None

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Merge `batch.remove` tokens of every tile."""
        key, importance = mean_keys(batch), self._importance(batch)
        protected = (*range(batch.leading), *range(-batch.trailing, 0))
        match = complete_graph_match(key, importance, batch.remove, protected)
        values, sizes = ensemble(batch.hidden, batch.sizes, match, ensemble_weights(match, importance))
        groups = torch.empty_like(match.rest[:, :1]).expand(-1, key.shape[1]).clone()
        groups.scatter_(1, match.kept, torch.arange(match.kept.shape[1], device=key.device).expand_as(match.kept))
        groups.scatter_(1, match.sources, groups.gather(1, match.rest.gather(1, match.partners)))
        return Reduction(values, groups, match.kept, sizes=sizes)

    def reduction_macs(self, shape: BlockShape) -> int:
        """Cosines of all keys, and the attention received; with a cross token that which it gives, or its query's cosines."""
        pairs, width = shape.tokens * shape.tokens, shape.dim // shape.heads
        received = self.variant == "llava" or (self.variant == "clip" and not shape.leading)
        one_row = {"llava": shape.dim, "clip": width, "matching": 0}[self.variant] * bool(shape.leading)
        return pairs * width + (pairs * shape.dim if received else 0) + shape.tokens * one_row

    def _importance(self, batch: BlockBatch) -> Tensor | None:
        if self.variant == "matching":
            return None
        if not batch.trailing:
            return attention_received(batch)
        if self.variant == "clip":
            assert batch.query is not None
            return query_importance(mean_keys(batch), batch.query.float().mean(2))
        # The mean over all queries but the cross token's, plus the cross token's.
        of_cross, tokens = attention_given(batch, -1), batch.hidden.shape[1]
        return (attention_received(batch) * tokens - of_cross) / (tokens - 1) + of_cross
