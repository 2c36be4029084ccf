"""SparseVLM: stages inside the language model, rated by the text that has to do with the image, with recycling."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import BudgetError, ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection
from vlmprune.methods.checks import check_choice, check_int, check_number
from vlmprune.methods.layer.sparsevlm_schedule import (
    OFFICIAL_TOKENS,
    RETAINED,
    Recycling,
    default_cuts,
    recycling,
    recycling_to,
    solve_stages,
)
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerMethod, check_depth, check_layers
from vlmprune.methods.needs import STILL_IMAGES, TEXT_BEFORE_CUT, Need
from vlmprune.methods.selection_macs import ScoredLayers
from vlmprune.methods.shared.density_peaks import density_peaks


@dataclass(frozen=True, kw_only=True)
class SparseVLM(LayerMethod):
    """Drop visual tokens in stages, by the attention of the text that has to do with the image, and recycle some of the dropped.

    Raters are chosen once, of what enters the first layer: the text tokens behind the image whose share of a softmax over text
    of `visual . text`, averaged over visual tokens, is above the mean. After each layer of a stage the tokens with most attention
    of the raters in that layer stay (mean over heads and raters), in position order. Of the others the best
    `int(recycle * n) + 1` are clustered around density peaks of the hidden states, in `int(m / cluster_size) + 1` clusters,
    whose means are appended to the image's tokens.

    `variant="v2"` is SparseVLM+: attention is divided by the rotary positions' own product, only the `heads` with the most
    attention of raters on the image count, nothing is recycled, positions stay.

    Give `retained`, the official code's nominal averages, whose lists for 576 tokens are scaled to the number of tokens; or
    `tokens` or `ratios` (from the paper's lambda), what each stage keeps besides recycled tokens; or `keep`, the true average
    over all layers, from which shares x, x**1.5, x**2.5 of the stages are solved.
    The paper's settings are `SparseVLM(retained=192)` (300, 200 and 110 tokens
    after layers 2, 6 and 15 of 32, 309, 204 and 113 with the recycled ones), 128, 96 and 64; without either, `keep` is 0.25. The
    official averages count a stage's layer as if it were cut already; true ones are 206.5, 145.4, 114.1 and 82.3.

    Positions: of "v1" as before the first layer: 1-D positions close the gaps after every stage, recycled tokens behind the
    others of their image, and a new token's position is the length of each layer's cache, as in the official code; with M-RoPE,
    for which there is none, tokens keep their ids and a recycled one has those of its cluster's centre. Of "v2" original.

    Attributes:
        layers: 0-based layers at whose input tokens are dropped (the official code names those before: 2, 6, 15); by default 3, 7
            and 16 of 32, scaled to the depth.
        retained: 192, 128, 96 or 64.
        tokens: tokens that each stage keeps; at least one is dropped.
        ratios: the same as shares of the tokens that entered, rounded half to even.
        variant: "v1" (the paper's code) or "v2" (SparseVLM+).
        recycle: share of the dropped tokens that is recycled (tau), in [0, 1); 0 for none. "v2" recycles none.
        cluster_size: tokens a cluster, an int >= 1.
        heads: heads that count in "v2"; by default 7 of 16 (14 of 32).

    Source: "SparseVLM: Visual Token Sparsification for Efficient Vision-Language Model Inference", ICML 2025, arXiv 2410.04417.
    Its first version chose counts by the rank of the attention matrix; the ICML code has the lists above. The paper sums
    clusters, the code averages them, as here. The official code adds random noise to densities, here ties go to the lowest
    index. It materialises the whole attention and serves one prompt with one image; here only the raters' rows are computed,
    and every image has raters of its own. Where no text token is above the mean all are raters. A stage that is asked to keep
    every token moves the least one to the end in the official code; here it does nothing.
    """

    layers: tuple[int, ...] | None = None
    retained: int | None = None
    tokens: tuple[int, ...] | None = None
    ratios: tuple[float, ...] | None = None
    variant: Literal["v1", "v2"] = "v1"
    recycle: float = 0.3
    cluster_size: int = 10
    heads: int | None = None

    name: ClassVar[str] = "sparsevlm"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TEXT_BEFORE_CUT})
    merges: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {
        "retained_tokens": "retained=",
        "pruning_loc": "layers=, each plus 1",
        "lambda": "ratios= or tokens=",
        "tau": "recycle=",
        "theta": "1 / cluster_size",
    }

    @property
    def positions(self) -> Literal["compact", "original"] | None:  # type: ignore[override]
        """What becomes of the gaps inside: see the class."""
        return "original" if self.variant == "v2" else None

    @property
    def share_recycled(self) -> float:
        """The share of dropped tokens that is recycled, in this variant."""
        return self.recycle if self.variant == "v1" else 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("variant", self.variant, ("v1", "v2"))
        check_number("recycle", self.recycle, "[0, 1)", "the share of dropped tokens that is recycled")
        check_int("cluster_size", self.cluster_size, 1)
        if self.heads is not None:
            check_int("heads", self.heads, 1)
        if self.layers is not None:
            object.__setattr__(self, "layers", check_layers("layers", self.layers))
        names = [name for name in ("keep", "retained", "tokens", "ratios") if getattr(self, name) is not None]
        if len(names) > 1:
            given = " and ".join(f"{name}={getattr(self, name)!r}" for name in names)
            raise ParameterError(f"{given} set the budget; give one of them. keep is the average over layers.")
        if not names:
            object.__setattr__(self, "keep", 0.25)
        if self.retained is not None and self.retained not in RETAINED[self.variant]:
            nearest = min(RETAINED[self.variant], key=lambda target: abs(target - check_count(self.retained)))
            raise ParameterError(
                f"retained={self.retained!r}; allowed: the official lists {', '.join(map(str, RETAINED[self.variant]))}; "
                f"nearest: {nearest}, or keep= for any average."
            )
        for name in ("tokens", "ratios"):
            self._check_stages(name)

    def _check_stages(self, name: str) -> None:
        stages = getattr(self, name)
        if stages is None:
            return
        if isinstance(stages, (str, int, float)) or not stages:
            raise ParameterError(f"{name}={stages!r}; allowed: a number for every stage.")
        for index, stage in enumerate(stages):
            if name == "tokens":
                check_int(f"tokens[{index}]", stage, 1)
            else:
                check_number(f"ratios[{index}]", stage, "(0, 1]", "the share of the tokens that stays")
        object.__setattr__(self, name, tuple(stages))
        if self.layers is not None and len(self.layers) != len(stages):
            raise ParameterError(
                f"layers={self.layers} has {len(self.layers)} stages, {name}={tuple(stages)} has {len(stages)}; "
                "allowed: one a layer."
            )
        if self.layers is None and len(stages) > 3:
            raise ParameterError(
                f"{name}={tuple(stages)} has {len(stages)} stages; allowed: 3 at most, or say layers= too."
            )

    def cut_layers(self, layers: int) -> tuple[int, ...]:
        """Return the layers of all stages."""
        if self.layers is not None:
            check_depth("layers", self.layers, layers)
            if isinstance(self.keep, float):
                solve_stages(self.keep, layers, self.layers)
            return self.layers
        check_depth("layers", (), layers)
        if isinstance(self.keep, float):
            return solve_stages(self.keep, layers, None)[0]
        stages = len(self.tokens or self.ratios or (0, 0, 0))
        cuts = default_cuts(layers, stages)
        if len(cuts) < stages and self.keep is None:
            raise ParameterError(
                f"{stages} stages, but {layers} layers leave room for {len(cuts)}; allowed: layers= in 1 to {layers - 1}."
            )
        return tuple(sorted({1, *cuts})) if self.keep is not None else cuts

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        """Return the stages of an image of `total` tokens."""
        cuts, alive = [], total
        if self.keep is None:
            for stage, cut in enumerate(self.cut_layers(layers)):
                alive = self.stage(stage, total, alive).total
                cuts.append(LayerCut(cut, alive))
            return tuple(cuts)
        share = self.keep / total if isinstance(self.keep, int) else self.keep
        if share >= 1:
            return ()
        try:
            places, shares = solve_stages(share, layers, self.layers)
        except BudgetError:
            if isinstance(self.keep, float):
                raise
            first = self.layers[0] if self.layers is not None else 1
            raise BudgetError(
                f"keep={self.keep} of {total} visual tokens, averaged over {layers} layers, cannot be reached: all tokens pass "
                f"the first {first} layers; nearest: keep={first * total // layers + 1}."
            ) from None
        return tuple(LayerCut(cut, max(1, round(total * part))) for cut, part in zip(places, shares, strict=True))

    def stage(self, stage: int, entered: int, alive: int, total: int | None = None) -> Recycling:
        """Return what becomes of an image's tokens at a stage.

        Args:
            stage: its number.
            entered: tokens that entered the language model.
            alive: tokens before the stage.
            total: tokens after it, where `keep` sets them.
        """
        if self.keep is not None:
            assert total is not None
            return recycling_to(alive, total, self.share_recycled, self.cluster_size)
        if self.retained is not None:
            wanted = round(RETAINED[self.variant][self.retained][stage] * entered / OFFICIAL_TOKENS)
        elif self.tokens is not None:
            wanted = self.tokens[stage]
        else:
            assert self.ratios is not None
            wanted = round(entered * self.ratios[stage])
        return recycling(alive, max(1, min(wanted, alive - 1)), self.share_recycled, self.cluster_size)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        """Keep the tokens that the raters look at, and recycle the best of the others."""
        assert batch.hidden is not None
        number = self.cut_layers(batch.layers).index(batch.layer) if self.keep is None else 0
        relations = self.relations(batch, self.raters(batch))
        stages = [
            self.stage(number, entered, alive, budget)
            for entered, alive, budget in zip(batch.entered, batch.counts, batch.budgets, strict=True)
        ]
        hidden = [batch.hidden[row, columns] for row, columns in zip(batch.rows, batch.columns, strict=True)]
        chosen = [
            select_and_recycle(relation, states, stage)
            for relation, states, stage in zip(relations, hidden, stages, strict=True)
        ]
        kept, groups = (torch.cat(parts) for parts in zip(*chosen, strict=True))
        counts = tuple(stage.total for stage in stages)
        if not any(stage.clusters for stage in stages):
            return Selection(kept, counts)
        merge = partial(merge_groups, groups=groups, tokens=batch.counts, counts=counts)
        return Selection(kept, counts, features=merge(torch.cat(hidden)), merge=merge, groups=groups)

    def raters(self, batch: LayerBatch) -> list[Tensor]:
        """Return the columns of each image's raters, int64; they are chosen once a prefill."""
        found = []
        for number, image in enumerate(batch.images):
            raters = batch.memory.get(("raters", image))
            if raters is None:
                raters = batch.memory["raters", image] = find_raters(*batch.entry[number])
            found.append(batch.text[number].after[raters])
        return found

    def relations(self, batch: LayerBatch, raters: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return how much the raters look at each alive token, fp32 `[counts[i]]` per image."""
        if self.variant == "v1":
            return batch.attention_of(raters, reduce_queries="mean")
        assert batch.probed is not None
        assert batch.hidden is not None
        head_dim, width = batch.probed.key.shape[-1], batch.hidden.shape[1]
        ones = torch.ones(batch.hidden.shape[0], width, 1, head_dim, device=batch.hidden.device)
        rotated = batch.probed.rotate(ones)[:, :, 0].float()
        return tuple(
            plus_relation(attention, rotated[row, rows] @ rotated[row, columns].T / head_dim**0.5, self.heads)
            for row, rows, columns, attention in zip(
                batch.rows, raters, batch.columns, batch.attention_of(raters, reduce_heads="none"), strict=True
            )
        )

    def own_macs(self, scored: ScoredLayers) -> int:
        """Products of what enters with the text, and distances of the tokens to be clustered."""
        total, cuts = 0, self.cut_layers(len(scored.visual))
        if scored.visual[-1] < scored.visual[0]:
            total += scored.visual[0] * scored.text * scored.dim
        for cut in cuts:
            dropped = scored.visual[cut - 1] - scored.visual[cut]
            if self.share_recycled and dropped > 0:
                total += (int(self.share_recycled * dropped) + 1) ** 2 * scored.dim
        return total


def find_raters(visual: Tensor, text: Tensor) -> Tensor:
    """Return which text tokens rate: int64 indices, ascending; all of them where none is above the mean.

    Args:
        visual: `[tokens, dim]`, visual tokens as they enter the language model.
        text: `[text, dim]`, the text behind them.
    """
    relevance = rater_relevance(visual, text)
    raters = (relevance > relevance.mean()).nonzero().flatten()
    return raters if len(raters) else torch.arange(len(text), device=text.device)


def rater_relevance(visual: Tensor, text: Tensor) -> Tensor:
    """Return each text token's share of the softmax over text of `visual . text`, averaged over visual tokens, fp32 `[text]`."""
    return (visual.float() @ text.float().T).softmax(-1).mean(0)


def plus_relation(attention: Tensor, gravity: Tensor, heads: int | None = None) -> Tensor:
    """Return the relation of version 2, fp32 `[tokens]`.

    Args:
        attention: fp32 `[raters, heads, tokens]`, softmaxed.
        gravity: fp32 `[raters, tokens]`, what it is divided by.
        heads: heads that count; by default 7 of 16.
    """
    return (attention / gravity[:, None])[:, plus_heads(attention, gravity, heads)].mean((0, 1))


def plus_heads(attention: Tensor, gravity: Tensor, heads: int | None = None) -> Tensor:
    """Return the heads with the most attention of raters on the image, int64, ascending; arguments as of `plus_relation`."""
    count = min(attention.shape[1], heads or max(1, round(attention.shape[1] * 7 / 16)))
    sums = (attention / gravity[:, None]).sum((0, 2))
    return segmented_topk(sums, (0, len(sums)), (count,))


def select_and_recycle(relation: Tensor, hidden: Tensor, stage: Recycling) -> tuple[Tensor, Tensor]:
    """Return what stays of one image: kept tokens in position order, then the centres of the clusters, by falling score.

    Args:
        relation: fp32 `[tokens]`.
        hidden: `[tokens, dim]`, what is clustered.
        stage: how many.

    Returns:
        Int64 `[stage.total]`, and int64 `[tokens]`, the place among these that each token went to, -1 where it is dropped.
    """
    kept = segmented_topk(relation, (0, len(relation)), (stage.kept,))
    groups = torch.full_like(relation, -1, dtype=torch.int64)
    groups[kept] = torch.arange(stage.kept, device=kept.device)
    if not stage.clusters:
        return kept, groups
    recycled = recycled_tokens(relation, kept, stage.recycled)
    centres, clusters = density_peaks(hidden[recycled], stage.clusters)
    groups[recycled] = stage.kept + clusters
    return torch.cat([kept, recycled[centres]]), groups


def recycled_tokens(relation: Tensor, kept: Tensor, count: int) -> Tensor:
    """Return the best `count` tokens that are not `kept`, int64, falling relation."""
    others = relation.index_fill(0, kept, -torch.inf)
    return segmented_topk(others, (0, len(others)), (count,), order="score")


def merge_groups(values: Tensor, groups: Tensor, tokens: Sequence[int], counts: Sequence[int]) -> Tensor:
    """Return the mean of each group, `[sum(counts), dim]`, fp32; single tokens as they are.

    Args:
        values: `[sum(tokens), dim]`, image after image.
        groups: int64 `[sum(tokens)]`, groups within the image, -1 for tokens in none.
        tokens: tokens per image.
        counts: groups per image.
    """
    starts = torch.tensor([sum(counts[:image]) for image in range(len(counts))]).to(groups.device, non_blocking=True)
    of_image = torch.arange(len(counts), device=groups.device).repeat_interleave(
        torch.tensor(tokens).to(groups.device, non_blocking=True), output_size=sum(tokens)
    )
    targets = torch.where(groups >= 0, groups + starts[of_image], sum(counts))
    sums = values.new_zeros(sum(counts) + 1, values.shape[1], dtype=torch.float32).index_add(0, targets, values.float())
    sizes = sums.new_zeros(sum(counts) + 1).index_add(0, targets, torch.ones_like(targets, dtype=torch.float32))
    # The official code's guard against empty clusters.
    sizes = torch.where(sizes > 1, sizes + 1e-6, sizes.clamp(min=1))
    return sums[:-1] / sizes[:-1, None]


def check_count(value: object) -> int:
    """Return an int; raises ParameterError for anything else."""
    check_int("retained", value, 1)
    assert isinstance(value, int)
    return value
