"""ToMe: in every block the most similar tokens of a bipartite split are averaged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.kernels.bipartite_match import bipartite_match
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_flag, check_int, check_number
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Reading, Reduction
from vlmprune.methods.needs import ANY_TOWER_BLOCKS, Need
from vlmprune.methods.shared.merge_schedule import counts_after, plan_for_keep
from vlmprune.methods.shared.merged_tokens import merge_tokens


@dataclass(frozen=True, kw_only=True)
class ToMe(EncoderMethod):
    """Split a block's tokens in two by turns, and average the r of the first set that are most similar to one of the second.

    It happens between attention and MLP of every block before the features; tokens are compared by their keys, averaged over
    heads, and weigh as many tokens as they stand for. Later attention counts them as often (`proportional_attention`).

    In a tower over packed pictures (Qwen2-VL and later) a token is a whole visual token, merged within its picture or frame and
    compared by the keys of its patches before their rotary positions; it takes its destination's positions and window.

    With `keep` the same number is removed in every block, one more in some of them so that `keep` is met exactly; 0.5 if
    nothing is given. The paper sets `r`, 7 or 8 for ViT-L, and with `inflection=-1` decreases it linearly to 0.

    Attributes:
        r: tokens removed in each block, an int, or one int a block (0 for those left out); at most half of the patches.
        inflection: in [-1, 1]: how r changes from block to block, from `r * (1 - inflection)` to `r * (1 + inflection)`.
        proportional_attention: whether the logarithm of a token's size is added to its logits; the paper leaves it out for
            towers trained without supervision. Needs the attention backend "sdpa" or "eager" in the tower.

    Source: "Token Merging: Your ViT But Faster", ICLR 2023, arXiv 2210.09461. Paper and official code agree and are
    for image classifiers; both give fp16 scores and break ties as it comes, here scores and averages are fp32 and ties
    go to the first token. The official code leaves tokens in the order of the split, which `order="official"` hands on.
    There is no official code for vision-language models.
    """

    r: int | tuple[int, ...] | None = None
    inflection: float = 0.0
    proportional_attention: bool = True

    name: ClassVar[str] = "tome"
    needs: ClassVar[frozenset[Need]] = frozenset({ANY_TOWER_BLOCKS})
    symbols: ClassVar[Mapping[str, str]] = {"prop_attn": "proportional_attention=prop_attn"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("proportional_attention", self.proportional_attention)
        check_number("inflection", self.inflection, "[-1, 1]")
        if self.r is None:
            if self.keep is None:
                object.__setattr__(self, "keep", 0.5)
            if self.inflection != 0:
                raise ParameterError(
                    f"inflection={self.inflection!r} changes r from block to block; give r and no keep."
                )
            return
        if self.keep is not None:
            raise ParameterError(f"keep={self.keep!r} and r={self.r!r} both set the budget; give one of them.")
        if isinstance(self.r, int):
            check_int("r", self.r, 0)
            return
        object.__setattr__(self, "r", _checked_list(self.r))
        if self.inflection != 0:
            raise ParameterError(f"inflection={self.inflection!r} with r={self.r!r}; allowed: with r as one int.")

    @property
    def reads(self) -> frozenset[Reading]:
        """The keys."""
        return frozenset({"keys"})

    @property
    def proportional(self) -> bool:
        """As `proportional_attention` says."""
        return self.proportional_attention

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return how many patches leave each block."""
        blocks = tower.feature_layer + 1
        if self.r is None:
            assert self.keep is not None
            return plan_for_keep(self.keep, self.output == "merged", patches, blocks)
        return counts_after(patches, removals(self.r, self.inflection, blocks))

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Match by keys, and average by sizes."""
        assert batch.key is not None
        metric = batch.key.detach().float().mean(2)
        match = bipartite_soft_matching(metric, batch.remove, class_token=batch.leading > 0)
        values, sizes = merge_tokens(batch.hidden, match.groups, batch.sizes, match.targets.shape[1])
        return Reduction(values, match.groups, match.targets, sizes)

    def reduction_macs(self, shape: BlockShape) -> int:
        """Cosines of one half of the tokens with the other, by the channels of one head."""
        second = shape.tokens // 2
        return (shape.tokens - second - shape.leading) * second * (shape.dim // shape.heads)


class Matching(NamedTuple):
    """Which tokens are merged, with A the tokens at even places and B those at odd places.

    Attributes:
        unmerged: int64 `[tiles, A - r]`, the rest of A, in its order in the output.
        sources: int64 `[tiles, r]`, the tokens of A that are merged, the most similar first.
        destinations: int64 `[tiles, r]`, the token of B that each goes to.
        groups: int64 `[tiles, tokens]`, the output of each token; the outputs are `unmerged`, then all of B.
        targets: int64 `[tiles, tokens - r]`, the token whose place each output takes.
    """

    unmerged: Tensor
    sources: Tensor
    destinations: Tensor
    groups: Tensor
    targets: Tensor


def bipartite_soft_matching(metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False) -> Matching:
    """Match `metric [tiles, tokens, dim]` and take the `r` best pairs, at most half of the tokens that may be merged.

    Args:
        metric: what is compared, by cosine.
        r: tokens to remove.
        class_token: whether token 0 is never merged.
        distill_token: whether token 1 is neither; it then comes second.
    """
    tiles, tokens, dim = metric.shape
    device = metric.device
    first, last = int(class_token), int(distill_token)
    r = max(0, min(r, (tokens - first - last) // 2))
    if r == 0:
        whole = torch.arange(tokens, device=device).expand(tiles, -1)
        nothing = whole[:, :0]
        return Matching(whole[:, : (tokens + 1) // 2], nothing, nothing, whole, whole)
    set_a, set_b = (tokens + 1) // 2, tokens // 2
    free_a, free_b = set_a - first, set_b - last
    partners, scores = bipartite_match(
        metric[:, 2 * first :: 2].reshape(-1, dim),
        metric[:, 1 + 2 * last :: 2].reshape(-1, dim),
        [tile * free_a for tile in range(tiles + 1)],
        [tile * free_b for tile in range(tiles + 1)],
    )
    order = scores.view(tiles, free_a).argsort(dim=1, descending=True, stable=True)
    merged = order[:, :r]
    sources, destinations = merged + first, partners.view(tiles, free_a).gather(1, merged) + last
    unmerged = order[:, r:] + first
    if class_token:
        unmerged = torch.cat([unmerged.new_zeros(tiles, 1), unmerged.sort(1).values], 1)
    b = torch.arange(set_b, device=device).expand(tiles, -1)
    places = torch.cat([2 * unmerged, 2 * b + 1], 1)
    if distill_token:
        # Both tokens in front of all others.
        stay = set_a - r
        front = [0, stay] if class_token else [stay]
        index = front + [place for place in range(tokens - r) if place not in front]
        places = places[:, index]
    groups = torch.full((tiles, tokens), -1, dtype=torch.int64, device=device)
    groups.scatter_(1, places, torch.arange(tokens - r, device=device).expand(tiles, -1))
    groups.scatter_(1, 2 * sources, groups.gather(1, 2 * destinations + 1))
    return Matching(unmerged, sources, destinations, groups, places)


def removals(r: int | Sequence[int], inflection: float, blocks: int) -> list[int]:
    """Return the tokens that each of `blocks` blocks removes.

    Raises:
        ParameterError: a list for more blocks than there are.
    """
    if not isinstance(r, int):
        if len(r) > blocks:
            raise ParameterError(
                f"r={tuple(r)} names {len(r)} blocks; allowed: at most {blocks}, those before the features."
            )
        return [*r, *[0] * (blocks - len(r))]
    lowest = int(r * (1 - inflection))
    step = (2 * r - 2 * lowest) / (blocks - 1) if blocks > 1 else 0.0
    return [int(lowest + step * block) for block in range(blocks)]


def _checked_list(r: object) -> tuple[int, ...]:
    allowed = "an int >= 0, or a sequence of such ints, one a block"
    if isinstance(r, (str, bool, float)) or not isinstance(r, Sequence) or not r:
        raise ParameterError(f"r={r!r}; allowed: {allowed}.")
    for item in r:
        if isinstance(item, bool) or not isinstance(item, int) or item < 0:
            raise ParameterError(f"r holds {item!r}; allowed: {allowed}.")
    return tuple(r)
