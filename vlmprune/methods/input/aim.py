"""AIM: similar tokens merged before the language model, and fewer and fewer tokens inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import accumulate
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.budget import Keep, check_keep
from vlmprune.errors import ParameterError
from vlmprune.methods.base import Method
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.checks import check_choice, check_int
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.layer.aim_pagerank import AIMPageRank
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.tile_segments import even_counts, tile_segments, to_device

from .aim_rounds import merge_rounds, merging, plan_rounds, rounds_left

# The average over layers of what the published schedule leaves of the merged tokens: 18.5 of 28 layers.
_INSIDE = 18.5 / 28


@dataclass(frozen=True, kw_only=True)
class AIM(InputMethod):
    """Merge the most similar visual tokens before the language model, and drop those that attention does not vote for inside it.

    Merging goes in rounds over the tokens of a tile. Every even one looks for the odd one with the highest cosine; those
    with the highest of these cosines join it, and it becomes their mean, whatever they stand for after earlier rounds.
    The first round removes half of the tokens, the second a quarter of the first number, and so on. Tiles keep equally
    many, as far as they have them; newlines are dropped first. Inside the language model `AIMPageRank` drops at every
    layer of a span, down to none.

    A merged token takes the place (and M-RoPE id) of its odd token. Tokens come in position order; the official order,
    `order="official"`, has the even ones that joined none first, by falling cosine, then the odd ones, as values in the
    same positions. It also decides which tokens are even in later rounds, with either order.

    `keep` (0.25 by default) is the average over layers of both stages: as many tokens are merged as leaves the published
    average inside, 0.66 of the merged ones; where `keep` is more, nothing is merged. The published setting is given as
    rounds and layers instead: `AIM(merge_rounds=2, layers=(14, 22))` on the 28 layers of LLaVA-OneVision-7B (196
    tokens a frame to 49), an average of 0.165, `AIM(merge_rounds=3, layers=(13, 21))` on the 32 of LLaVA-1.5-7B (576 to
    72), 0.068. Either alone takes the other from the first of these, layers scaled with the depth.

    Positions: inside the language model tokens stay where they entered it; before it as with other input methods.

    Attributes:
        keep: average over layers, a share or a number of tokens; None with `merge_rounds` or `layers`.
        merge_rounds: rounds of merging, 0 for none; each removes half as many tokens (the paper's r) as the one before.
        layers: `(l1, l2)`, the last layer with all merged tokens and the first with none.
        temperature: the paper's tau, which divides the logits of the attention that votes.
        iterations: rounds of voting.
        order: "position" or "official".
        faithful: inside the language model tokens are only masked, as in the official code; see `AIMPageRank`.

    Source: "AIM: Adaptive Inference of Multi-Modal LLMs via Token Merging and Pruning", ICCV 2025, arXiv 2412.03248. The
    official code merges video frames only and serves images without merging; here images are merged, tile by tile. Its
    schedule is one layer later than the paper's formula in the code, and takes effect one layer after that, as here
    (`layers` are the code's numbers). The official code merges tokens of Qwen2-VL until they fit a smaller grid; here they
    keep the ids of places in the whole grid.
    """

    keep: Keep | None = None  # type: ignore[assignment]
    merge_rounds: int | None = None
    layers: tuple[int, int] | None = None
    temperature: float = 0.1
    iterations: int = 5
    order: Literal["position", "official"] = "position"
    faithful: bool = False

    name: ClassVar[str] = "aim"
    merges: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {
        "l1": "layers=(l1, l2)",
        "l2": "layers=(l1, l2)",
        "tau": "temperature=tau",
        "r": "merge_rounds=, each removes half as many as the one before",
    }

    def __post_init__(self) -> None:
        if self.merge_rounds is None and self.layers is None:
            object.__setattr__(self, "keep", check_keep(0.25 if self.keep is None else self.keep))
        elif self.keep is not None:
            given = {"merge_rounds": self.merge_rounds, "layers": self.layers}
            others = " and ".join(f"{name}={value!r}" for name, value in given.items() if value is not None)
            raise ParameterError(
                f"keep={self.keep!r} and {others} both set the budget; give keep, the average over layers, or the others."
            )
        if self.merge_rounds is not None:
            check_int("merge_rounds", self.merge_rounds, 0)
        check_choice("order", self.order, ("position", "official"))
        self.parts()

    def parts(self) -> tuple[Method, ...]:
        """Return this first stage, and the second one unless nothing is to be dropped."""
        if self.keep == 1.0:
            return (self,)
        keep = self.keep
        if isinstance(keep, float):
            # Of the tokens that enter the language model.
            keep = max(keep, _INSIDE)
        second = AIMPageRank(
            keep=keep,
            layers=self.layers,
            temperature=self.temperature,
            iterations=self.iterations,
            faithful=self.faithful,
        )
        return (self, second)

    def budget(self, total: int) -> int:
        """Return how many of `total` visual tokens of one image enter the language model."""
        if self.keep is None:
            return max(1, rounds_left(total, 2 if self.merge_rounds is None else self.merge_rounds)) if total else 0
        share = self.keep / total if isinstance(self.keep, int) and total else self.keep
        return min(total, max(1, round(total * min(1.0, share / _INSIDE)))) if total else 0

    def select(self, batch: VisualBatch) -> Selection:
        """Merge each image to `budgets[i]` tokens."""
        segments = tile_segments(batch.layouts)
        counts = even_counts(segments, batch.budgets)
        width, device = counts.shape[1], batch.features.device
        newlines = torch.zeros(len(segments.sizes), width, dtype=torch.bool)
        newlines[:, -1] = True
        order = to_device(segments.order, device)
        # Tiles that keep none, and newlines beyond what they fill up, are dropped before; the rest is merged.
        sizes = torch.where(newlines | (counts == 0), counts, segments.sizes).flatten()
        starts = torch.tensor(segments.offsets[:-1])
        entering = torch.cat(
            [torch.arange(size) + start for start, size in zip(starts.tolist(), sizes.tolist(), strict=True)]
        )
        tokens = order[to_device(entering, device)]
        rounds = plan_rounds(tuple(sizes.tolist()), tuple(counts.flatten().tolist()))
        merged = merge_rounds(batch.features[tokens], rounds)

        position = tokens[merged.positions]
        by_position = position.argsort()
        rows = by_position if self.order == "position" else torch.arange(len(position), device=device)
        output = torch.empty_like(rows).index_copy_(0, rows, torch.arange(len(rows), device=device))
        firsts = torch.tensor(list(accumulate(batch.budgets[:-1], initial=0))).repeat_interleave(
            torch.tensor(batch.budgets)
        )
        local = output - to_device(firsts, device)[output]
        groups = torch.full((sum(batch.counts),), -1, device=device)
        groups[tokens] = local[merged.groups]
        again = merging(merged)

        def merge(deep: Tensor) -> Tensor:
            return again(deep[tokens.to(deep.device)])[rows.to(deep.device)].to(deep.dtype)

        begins = torch.tensor(batch.offsets[:-1]).repeat_interleave(torch.tensor(batch.budgets))
        return Selection(
            kept=position[by_position] - to_device(begins, device),
            counts=batch.budgets,
            features=merged.values[rows].to(batch.features.dtype),
            merge=merge,
            groups=groups,
        )

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of even and odd tokens in every round, tokens spread evenly over tiles."""
        macs = 0
        for total, kept in scored.images:
            rounds = plan_rounds((total // scored.tiles,), (max(1, kept // scored.tiles),))
            macs += sum(len(each.sources) * len(each.destinations) for each in rounds) * scored.tiles * scored.dim
        return macs
