"""HoloV: a quota for every run of tokens, by its attention and the variety inside it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.errors import ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_int, check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import STILL_IMAGES, TOWER_ATTENTION, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.apportion import apportion
from vlmprune.methods.shared.patches import patch_budgets, patches_of, select_patches
from vlmprune.methods.shared.tile_segments import to_device

EPSILON = 1e-6
ATTENTION_SCALE = 1000.0


@dataclass(frozen=True, kw_only=True)
class HoloV(InputMethod):
    """Cut the tokens of an image in runs, give each a quota by its score, and take the best of each.

    A token's score is its attention (of the CLS token in the layer whose output becomes the visual tokens, mean over
    heads; received attention where there is no CLS token) plus `beta` times the variance of its cosines to the other
    tokens of its run, scaled to the attention's mean. A run's weight is the mean score of its tokens. Newlines are no
    part of a run and are dropped first; kept tokens stay in position order.

    Source: "Don't Just Chase 'Highlighted Tokens' in MLLMs: Revisiting Visual Holistic Context Retention", NeurIPS
    2025, arXiv 2510.02912. Runs are consecutive tokens of the flattened sequence, thumbnail first, as in the official
    code, not windows of the image. `mode="code"` (the default): `beta` 0.09, tokens of a run are taken by attention
    alone, what rounding leaves goes one by one to the heaviest runs. `mode="paper"`: `beta` 1, tokens are taken by
    the score, what rounding leaves goes to the heaviest run. Where a quota exceeds its run, the rest goes to the
    other runs, in "paper" in proportion to weight times free tokens. The official code loses that rest and feeds zero
    vectors in its place, and it feeds tokens run by run, inside a run by falling attention; `faithful=True` (with
    mode "code") does both. The paper's refetching of visual context in middle layers is not in the official code, nor
    here. The official Qwen code scores tokens in window order and is off by one token; here neither is done.

    Attributes:
        mode: "code" or "paper".
        num_patches: runs per image (P); `int(1024 / 576 * N / K)` for K of N tokens if not given.
        beta: weight of the variance; as the mode says if not given.
        faithful: official order, and zero vectors where a run has too few tokens.
    """

    mode: Literal["code", "paper"] = "code"
    num_patches: int | None = None
    beta: float | None = None
    faithful: bool = False

    name: ClassVar[str] = "holov"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_ATTENTION})
    symbols: ClassVar[Mapping[str, str]] = {"P": "num_patches="}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("mode", self.mode, ("code", "paper"))
        if self.num_patches is not None:
            check_int("num_patches", self.num_patches, low=1)
        if self.beta is not None:
            check_number("beta", self.beta, "[0, inf)")
        check_flag("faithful", self.faithful)
        if self.faithful and self.mode != "code":
            raise ParameterError('faithful=True is what the official code does; set mode="code".')

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention of the feature layer."""
        return (tower.attention(tower.feature_layer),)

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` tokens of each image."""
        scores = self.run_scores(batch)
        if self.faithful:
            return official_selection(batch, self.official_order(scores, batch))
        counts = scores.runs.flat(self._exact_quotas(scores, batch))
        offsets, total = scores.runs.offsets, sum(patch_budgets(batch))
        if counts.device.type == "cuda":
            picks = segmented_topk(scores.ranking, to_device(torch.tensor(offsets), counts.device), counts, total=total)
        else:
            picks = segmented_topk(scores.ranking, offsets, counts)
        starts = to_device(scores.runs.start_in_image, counts.device)
        return select_patches(picks + starts.repeat_interleave(counts, output_size=total), batch)

    def feature_macs(self, scored: Scored) -> int:
        """Cosines of all pairs inside every run, shorter runs filled up to the longest."""
        total = 0
        for tokens, kept in scored.images:
            if kept < tokens:
                runs = self.number_of_runs(tokens, kept)
                total += runs * (-(-tokens // runs)) ** 2 * scored.dim
        return total

    def runs(self, batch: VisualBatch) -> Runs:
        """Return how the patches of the batch are cut."""
        pairs = zip(patches_of(batch.layouts).counts, patch_budgets(batch), strict=True)
        return _runs(tuple((total, self.number_of_runs(total, budget)) for total, budget in pairs))

    def number_of_runs(self, total: int, budget: int) -> int:
        """Return how many runs the `total` patches of an image are cut in if `budget` of them stay."""
        wanted = self.num_patches if self.num_patches is not None else int(1024 / 576 * total / max(budget, 1))
        return max(1, min(total, wanted))

    def run_scores(self, batch: VisualBatch) -> RunScores:
        """Return the scores of all patches and the weight of every run."""
        runs, device = self.runs(batch), batch.features.device
        indices = to_device(patches_of(batch.layouts).indices, device)
        (signal,) = self.vision_signals(batch.tower)
        attention = batch.vision[signal].float().mean(-1)[indices]
        places, sizes = to_device(runs.places, device), to_device(runs.sizes, device)[:, None].float()
        present = places >= 0
        tokens = batch.features[indices].float()
        tokens = tokens / (tokens.norm(dim=-1, keepdim=True) + EPSILON)
        unit = tokens[places.clamp(min=0)] * present[..., None]
        cosines = unit @ unit.transpose(1, 2)
        cosines.diagonal(dim1=1, dim2=2).zero_()
        others = (sizes - 1).clamp(min=1)
        mean = cosines.sum(-1) / others
        # The zero that stands in the place of a token's cosine to itself counts, as in the official code.
        spread = (cosines - mean[..., None]).square().masked_fill_(~present[:, None], 0)
        variance = (spread.sum(-1) / others).masked_fill(~present, 0)
        scaled = (ATTENTION_SCALE * attention)[places.clamp(min=0)].masked_fill(~present, 0)
        beta = self.beta if self.beta is not None else 0.09 if self.mode == "code" else 1.0
        scale = scaled.abs().sum(1, keepdim=True) / sizes / (variance.abs().sum(1, keepdim=True) / sizes + EPSILON)
        score = scaled + beta * scale * variance
        # The attention of a run of one token counts as it is.
        weights = torch.where(sizes > 1, score, scaled / ATTENTION_SCALE).sum(1) / sizes[:, 0]
        return RunScores(attention if self.mode == "code" else score[present], weights, runs)

    def quotas(self, scores: RunScores, batch: VisualBatch) -> Tensor:
        """Return the quota of every run, whether or not it has that many tokens: int64 `[images, most runs]`."""
        shares = scores.shares
        budgets = to_device(torch.tensor(patch_budgets(batch)), shares.device)[:, None]
        quota = (shares * budgets).floor().long()
        left = budgets - quota.sum(1, keepdim=True)
        rank = shares.argsort(dim=1, descending=True, stable=True).argsort(1)
        return quota + ((rank < left) if self.mode == "code" else left * (rank == 0))

    def _exact_quotas(self, scores: RunScores, batch: VisualBatch) -> Tensor:
        quota, weights = self.quotas(scores, batch), scores.shares
        sizes = scores.runs.by_image(to_device(scores.runs.sizes, quota.device))
        held = torch.minimum(quota, sizes)
        free = sizes - held
        return held + apportion((quota - held).sum(1), weights if self.mode == "code" else weights * free, free)

    def official_order(self, scores: RunScores, batch: VisualBatch) -> list[Tensor]:
        """Return the patches of each image in the official order, int64 `[budget]` each, -1 for a zero vector."""
        runs = scores.runs
        sizes, quota = runs.sizes, runs.flat(self.quotas(scores, batch)).cpu()
        counts = torch.minimum(quota, sizes)
        picks = segmented_topk(scores.ranking, runs.offsets, counts, order="score")
        run = torch.arange(len(sizes)).repeat_interleave(counts).to(picks.device)
        # A run that is kept whole comes in position order.
        whole = to_device(quota >= sizes, picks.device)[run]
        place = torch.where(whole, picks, torch.arange(len(picks), device=picks.device))
        picks = (picks + to_device(runs.start_in_image, picks.device)[run])[((run << 40) + place).argsort()]
        per_image = runs.by_image(counts).sum(1).tolist()
        budgets = patch_budgets(batch)
        return [
            pad(part[:budget], (0, max(0, budget - len(part))), value=-1)
            for part, budget in zip(picks.split(per_image), budgets, strict=True)
        ]


@dataclass(frozen=True, eq=False)
class Runs:
    """The patches of a batch cut in consecutive runs, image after image.

    Attributes:
        sizes: int64 `[runs]` on the CPU.
        start_in_image: int64 `[runs]` on the CPU, the first patch of each run, counted in its image.
        places: int64 `[runs, longest]` on the CPU, the packed patches of each run, -1 behind its end.
        present: bool `[images, most runs]` on the CPU, which of them exist.
    """

    sizes: Tensor
    start_in_image: Tensor
    places: Tensor
    present: Tensor

    @property
    def offsets(self) -> list[int]:
        """Start of each run in the packed patches, and the end of the last."""
        return [0, *self.sizes.cumsum(0).tolist()]

    def by_image(self, values: Tensor) -> Tensor:
        """Bring `values [runs]` in the shape `[images, most runs]`, 0 where there is no run."""
        dense = values.new_zeros(self.present.shape)
        return dense.masked_scatter_(to_device(self.present, values.device), values)

    def flat(self, values: Tensor) -> Tensor:
        """Undo `by_image`."""
        index = to_device(self.present.flatten().nonzero().flatten(), values.device)
        return values.flatten()[index]


class RunScores(NamedTuple):
    """What the runs are chosen and their tokens are taken by.

    Attributes:
        ranking: fp32 `[patches]`, what the tokens of a run are taken by.
        weights: fp32 `[runs]`, the scores of the runs.
        runs: how the patches are cut.
    """

    ranking: Tensor
    weights: Tensor
    runs: Runs

    @property
    def shares(self) -> Tensor:
        """The weights as shares of their image's, fp32 `[images, most runs]`."""
        weights = self.runs.by_image(self.weights)
        return weights / (weights.sum(1, keepdim=True) + EPSILON)


@lru_cache(maxsize=64)
def _runs(images: tuple[tuple[int, int], ...]) -> Runs:
    """Return the runs of images with that many patches and runs; the first ones are longer by a token where they must be."""
    sizes = [
        torch.full((number,), total // number) + (torch.arange(number) < total % number) for total, number in images
    ]
    starts = torch.cat([size.cumsum(0) - size for size in sizes])
    flat = torch.cat(sizes)
    step = torch.arange(int(flat.max()))
    places = torch.where(step < flat[:, None], (flat.cumsum(0) - flat)[:, None] + step, -1)
    most = max(number for _, number in images)
    present = torch.arange(most) < torch.tensor([number for _, number in images])[:, None]
    return Runs(flat, starts, places, present)


def official_selection(batch: VisualBatch, order: list[Tensor]) -> Selection:
    """Put the patches of each image in the given order, as values in the positions of the kept ones; -1 is a zero vector.

    Zero vectors take the positions of the first patches that are not kept.
    """
    device, patches = batch.features.device, patches_of(batch.layouts)
    kept, sources, groups = [], [], []
    images = zip(batch.offsets, batch.counts, patches.offsets, patches.counts, order, strict=False)
    for start, total, first, count, chosen in images:
        own = to_device(patches.indices[first : first + count] - start, device)
        real = chosen[chosen >= 0]
        taken = torch.zeros(count, dtype=torch.bool, device=device).index_fill_(0, real, True)
        spare = (~taken).nonzero().flatten()[: len(chosen) - len(real)]
        kept.append(own[taken.index_fill_(0, spare, True)])
        sources.append(torch.where(chosen >= 0, own[chosen.clamp(min=0)] + start, sum(batch.counts)))
        group = torch.full((total,), -1, device=device)
        groups.append(group.index_put_((own[real],), (chosen >= 0).nonzero().flatten()))
    source = torch.cat(sources)

    def merge(values: Tensor) -> Tensor:
        return pad(values, (0, 0, 0, 1))[source.to(values.device)]

    counts = tuple(len(chosen) for chosen in order)
    return Selection(torch.cat(kept), counts, merge(batch.features), merge, torch.cat(groups))
