"""Zero-TPrune: tokens dropped between blocks, by PageRank on the attention graph and by their likeness to others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import torch

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_flag, check_int, check_number
from vlmprune.methods.encoder.zero_tprune_graph import complement, most_redundant, top_votes, weighted_votes
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Place, Reading, Reduction
from vlmprune.methods.shared.tower_attention import mean_keys
from vlmprune.methods.shared.tower_plan import all_but_one, blocks_within, check_blocks, leaving, spread_blocks

# After blocks 1, 3, 6, 9 and 11 of DeiT-S's 12, of which the first and the last keep all.
DEPTHS = (3 / 12, 6 / 12, 9 / 12)


@dataclass(frozen=True, kw_only=True)
class ZeroTPrune(EncoderMethod):
    """Drop tokens behind some blocks: first of the unimportant those that resemble the important, then the least important.

    Importance is a weighted PageRank on the block's attention: votes are passed on along the attention rows for some rounds, the
    CLS token starting with `sqrt(tokens)` times the votes of the others (all equal without one), and the heads' votes are
    combined by the root of their mean square, over heads whose votes vary between `variance` (of votes with mean one; all
    heads where none does). One round orders the tokens (I'); of the less important half, the `redundant` ones whose keys
    (mean over heads) are most similar to one of the other half go (S); rounds on the attention among the rest, its rows
    normalised again, choose what stays (I). Dropped tokens do not come back: with `output="full"` they have the
    hidden state that they were dropped with. Tokens stay in the order of their positions; CLS always stays.

    Source: "Zero-TPrune: Zero-Shot Token Pruning through Leveraging of the Attention Graph in Pre-Trained Transformers",
    arXiv 2305.17328, for image classification. There is no official code, and no figures with a language model. Ours where the
    paper leaves it open: votes are divided by their sum at the start, the scale of the variance, all heads where none
    varies as it should, an odd token goes to the more important half, mean keys, normalised rows in the last stage, and
    where tokens go: behind three blocks at a quarter, half and three quarters of the tower, the same share in each.

    Attributes:
        layers: 0-based blocks behind which tokens are dropped.
        retention: share of its patches that each of `layers` leaves, in their order, instead of `keep`.
        redundant: most tokens that go in stage S of a block; about 10 in the paper.
        iterations: rounds of votes in stage I, for all blocks; by default as the paper says, 30 in the tower's first
            three blocks, 1 in its last three, and 5 between.
        variance: lowest and highest variance of the votes of a head that is used.
        boost_cls: whether CLS starts with more votes; the paper's "Zero-TPrune-uni" is False.
    """

    layers: tuple[int, ...] | None = None
    retention: tuple[float, ...] | None = None
    redundant: int = 10
    iterations: int | None = None
    variance: tuple[float, float] = (0.01, 0.7)
    boost_cls: bool = True

    name: ClassVar[str] = "zero_tprune"
    drops: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {
        "vmin": "variance=(vmin, vmax)",
        "vmax": "variance=(vmin, vmax)",
        "iters": "iterations=",
        "prune_S": "redundant=",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.layers is not None:
            object.__setattr__(self, "layers", check_blocks("layers", self.layers))
        if self.retention is not None:
            if self.keep is not None:
                raise ParameterError(
                    f"keep={self.keep!r} and retention={self.retention!r} both say what stays; give one."
                )
            if (
                self.layers is None
                or not isinstance(self.retention, (tuple, list))
                or len(self.retention) != len(self.layers)
            ):
                raise ParameterError(
                    f"retention={self.retention!r}; allowed: one share for each of layers={self.layers!r}."
                )
            for share in self.retention:
                check_number("retention", share, "(0, 1]")
            object.__setattr__(self, "retention", tuple(self.retention))
        elif self.keep is None:
            object.__setattr__(self, "keep", 0.75 if self.output == "full" else 0.5)
        check_int("redundant", self.redundant, 0)
        if self.iterations is not None:
            check_int("iterations", self.iterations, 1)
        if not isinstance(self.variance, (tuple, list)) or len(self.variance) != 2:
            raise ParameterError(f"variance={self.variance!r}; allowed: (lowest, highest).")
        check_number("variance[0]", self.variance[0], "[0, inf)")
        check_number("variance[1]", self.variance[1], f"[{self.variance[0]}, inf]")
        object.__setattr__(self, "variance", tuple(self.variance))
        check_flag("boost_cls", self.boost_cls)

    @property
    def place(self) -> Place:
        """Behind a block."""
        return "after block"

    @property
    def reads(self) -> frozenset[Reading]:
        """Queries and keys."""
        return frozenset({"keys", "queries"})

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return what leaves each block: the same share goes behind each of `layers`, or what `retention` leaves."""
        blocks = tower.feature_layer + 1
        layers = spread_blocks(DEPTHS, tower) if self.layers is None else blocks_within("layers", self.layers, blocks)
        if self.retention is None:
            assert self.keep is not None
            merged = self.output == "merged"
            return leaving(self.keep, merged, patches, blocks, merging=layers, by="share", limit=all_but_one)
        leaves, shares = [], dict(zip(layers, self.retention, strict=True))
        for block in range(blocks):
            patches = max(1, round(patches * shares.get(block, 1.0)))
            leaves.append(patches)
        return tuple(leaves)

    def rounds(self, block: int, layers: int) -> int:
        """Return the rounds of votes of stage I behind a block of a tower of `layers` blocks."""
        if self.iterations is not None:
            return self.iterations
        return 30 if block < 3 else 1 if block >= layers - 3 else 5

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Drop `batch.remove` tokens of every tile."""
        query, key = batch.query, batch.key
        assert query is not None
        assert key is not None
        class_token, boost = batch.leading > 0, self.boost_cls and batch.leading > 0
        tokens = batch.hidden.shape[1]
        votes_of = partial(weighted_votes, scale=batch.scale, boost_first=boost, variance=self.variance)
        importance = votes_of(query, key, 1).importance
        similar = min(self.redundant, batch.remove, batch.patches // 2)
        left = complement(most_redundant(importance, mean_keys(batch), similar, class_token).dropped, tokens)
        wide = left[..., None, None].expand(-1, -1, *key.shape[2:])
        rounds = self.rounds(batch.block, batch.tower.layers)
        votes = votes_of(query.gather(1, wide), key.gather(1, wide), rounds)
        kept = left.gather(1, top_votes(votes.importance, batch.patches - batch.remove, class_token))
        groups = torch.full(batch.hidden.shape[:2], -1, dtype=torch.int64, device=kept.device)
        groups.scatter_(1, kept, torch.arange(kept.shape[1], device=kept.device).expand_as(kept))
        values = batch.hidden.gather(1, kept[..., None].expand(-1, -1, batch.hidden.shape[2]))
        return Reduction(values, groups, kept)

    def reduction_macs(self, shape: BlockShape) -> int:
        """Both attention matrices and the votes on them, and the cosines of one half of the keys to the other."""
        patches = shape.tokens - shape.leading
        half = patches // 2
        left = shape.tokens - min(self.redundant, shape.tokens - shape.outputs, half)
        total = half * (patches - half) * (shape.dim // shape.heads)
        for tokens, rounds in ((shape.tokens, 1), (left, self.rounds(shape.block, shape.layers))):
            total += tokens * tokens * (shape.dim + shape.heads * rounds)
        return total
