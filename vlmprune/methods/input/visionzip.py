"""VisionZip: dominant tokens by attention, and contextual tokens that the others are merged into."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.merge_to_targets import merge_to_targets
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_number
from vlmprune.methods.needs import TOWER_ATTENTION, TOWER_FEATURES, Need
from vlmprune.methods.picture_method import PictureMethod
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.features import features_signal
from vlmprune.methods.shared.tile_segments import tile_segments, to_device

from .visionzip_plan import VisionZipPlan, tile_share, visionzip_plan

MergeAt = Literal["tower", "projected"]


@dataclass(frozen=True, kw_only=True)
class VisionZip(PictureMethod):
    """Keep the tokens that the CLS token attends to most, and merge the others into a few evenly spaced ones of them.

    Of `T` tokens that a tile keeps, `round(T * contextual)` (one at least, if `T` is more than one) are contextual,
    the others dominant. Dominant are the CLS token itself and the patches with the highest CLS attention (summed over
    heads) in the layer whose output becomes the visual tokens. Of the remaining patches every `step`-th is a target,
    `step` their number over the number of contextual tokens, rounded down; each other patch joins the target whose
    key (of the same layer, mean over heads) has the highest cosine to its own. A contextual token is the target plus
    the mean of the patches that joined it. Every tile keeps the same number of tokens, as far as it has that many;
    newlines are dropped first.

    Merged tokens keep the target's position, and the tokens come in position order; the CLS token takes the place of
    the tile's first patch that is neither dominant nor a target. The official order is `order="official"`: thumbnail
    (CLS, dominant, contextual tokens), dominant patches of the crops row by row, CLS tokens of the crops, contextual
    tokens crop by crop, as values in the same kept positions.

    Videos are served too, every frame as an image with an even share of the budget.

    Source: "VisionZip: Longer is Better but Not Necessary in Vision Language Models", CVPR 2025, arXiv 2412.04467.
    The paper averages similar tokens; target plus mean is the official code's, and so is the CLS token among the
    dominant ones. The official code merges features before the projector (`merge_at="tower"`, the default where there
    is a CLS token); its ports to Qwen and towers without CLS token merge visual tokens (`merge_at="projected"`, the
    default there), score by the attention received in the feature layer, and send no CLS token. The official code
    counts `dominant` and `contextual` tokens per tile (54 + 10, 108 + 20, 162 + 30: always 10 of 64), here `keep`
    counts all tokens of an image. A tile whose tokens are all kept is left as it is. On LLaVA-NeXT the official code
    also takes padding tokens, which transformers' models do not have.

    Attributes:
        contextual: share of the kept tokens that are contextual, above 0 and below 1.
        cls_token: whether the CLS token's features go to the language model, where there is one and a tile keeps two
            dominant tokens.
        merge_at: "tower" for features before the projector, "projected" for visual tokens.
        order: "position" or "official".
    """

    contextual: float = 10 / 64
    cls_token: bool = True
    merge_at: MergeAt | None = None
    order: Literal["position", "official"] = "position"

    name: ClassVar[str] = "visionzip"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_ATTENTION, TOWER_FEATURES})
    merges: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("contextual", self.contextual, "(0, 1)", "the share of the kept tokens that are contextual")
        check_flag("cls_token", self.cls_token)
        check_choice("order", self.order, ("position", "official"))
        if self.merge_at is not None:
            check_choice("merge_at", self.merge_at, ("tower", "projected"))

    def _merges_in_tower(self, tower: TowerFacts) -> bool:
        return tower.has_cls if self.merge_at is None else self.merge_at == "tower"

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for attention and keys of the feature layer, and for the features and the CLS token's where they are used."""
        layer = tower.feature_layer
        signals = [tower.attention(layer), VisionSignal("keys", layer)]
        if self._merges_in_tower(tower):
            signals.append(features_signal(tower))
        if self.cls_token and tower.has_cls:
            signals.append(VisionSignal("cls_features", layer))
        return tuple(signals)

    def select(self, batch: VisualBatch) -> Selection:
        """Keep `budgets[i]` tokens of each image."""
        signals = {signal.kind: signal for signal in self.vision_signals(batch.tower)}
        plan = visionzip_plan(batch.layouts, batch.budgets, self.contextual, "cls_features" in signals)
        dominant, pool = self.split(batch, plan)
        device, tokens = dominant.device, sum(batch.counts)
        places = pool[to_device(plan.merged_places, device)]
        targets = places[: len(plan.targets)]
        values = batch.vision[signals["features"]] if "features" in signals else batch.features
        keys = batch.vision[signals["keys"]].unflatten(-1, (batch.tower.heads, -1)).mean(1)
        offsets, ends = plan.pool_offsets, plan.target_offsets
        merged = merge_to_targets(
            values[pool], keys[pool], offsets, to_device(plan.targets, device), ends, combine="target_plus_mean"
        )
        own = torch.arange(len(targets), device=device)
        members = merged.groups.index_fill(0, to_device(plan.merged_places[: len(targets)], device), -1)
        contextual = _projected(batch, merged.values) if "features" in signals else merged.values
        rows = [contextual]
        if "cls_features" in signals:
            states = torch.cat(batch.tile_vision[signals["cls_features"]])
            rows.append(_projected(batch, states[to_device(plan.cls_rows, device)]))
        table = torch.cat([batch.features, *(row.to(batch.features.dtype) for row in rows)])

        # Outputs are the dominant tokens, then the contextual ones, then the CLS tokens, until they are sorted.
        image_of = to_device(torch.tensor(batch.counts), device)
        image_of = torch.arange(len(batch.counts), device=device).repeat_interleave(image_of, output_size=tokens)
        position = torch.cat([dominant, places])
        by_position = position.argsort()
        order = by_position if self.order == "position" else self._official_order(plan, position, image_of)
        source = torch.cat([dominant, tokens + torch.arange(len(places), device=device)])[order]
        first_output = to_device(torch.tensor(batch.budgets).cumsum(0) - torch.tensor(batch.budgets), device)
        output = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device))
        output = output - first_output[image_of[position]]
        groups = torch.full((tokens,), -1, device=device)
        groups[pool] = output[len(dominant) + merged.groups]
        groups[dominant] = output[: len(dominant)]

        def merge(deep: Tensor) -> Tensor:
            rows, into, at, chosen = (index.to(deep.device) for index in (pool, members, places, source))
            means, _ = merge_scatter(deep[rows], into, None, len(own))
            return torch.cat([deep, deep[at[: len(own)]] + means, deep[at[len(own) :]]])[chosen]

        starts = to_device(torch.tensor(batch.offsets[:-1]), device)
        kept = position[by_position]
        return Selection(kept - starts[image_of[kept]], batch.budgets, table[source], merge, groups)

    def split(self, batch: VisualBatch, plan: VisionZipPlan) -> tuple[Tensor, Tensor]:
        """Return the packed indices of the dominant tokens, and of the others of the tiles that merge, tile after tile."""
        segments = tile_segments(batch.layouts)
        order = to_device(segments.order, batch.features.device)
        scores = batch.vision[batch.tower.attention(batch.tower.feature_layer)].float().sum(-1)[order]
        local = segmented_topk(scores, segments.offsets, plan.dominant)
        starts = torch.tensor(segments.offsets[:-1]).repeat_interleave(torch.tensor(plan.dominant))
        chosen = local + to_device(starts, local.device)
        rest = to_device(plan.merging, local.device).index_fill(0, chosen, False)
        # The places of true values, without waiting to learn how many there are.
        pool = rest.logical_not().to(torch.int8).argsort(stable=True)[: plan.pool_offsets[-1]]
        return order[chosen], order[pool]

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of keys with those of the targets, and the second run of the projector; tokens spread evenly over tiles."""
        total = 0
        for tokens, kept in scored.images:
            size, count = tokens // scored.tiles, kept // scored.tiles
            share = tile_share(size, count, self.contextual, self.cls_token and scored.has_cls)
            total += scored.tiles * (size - share.dominant) * share.contextual * scored.head_dim
            if scored.has_cls if self.merge_at is None else self.merge_at == "tower":
                total += scored.tiles * share.contextual * scored.projector
            total += scored.tiles * share.cls * scored.projector
        return total

    def _official_order(self, plan: VisionZipPlan, position: Tensor, image_of: Tensor) -> Tensor:
        stage, within = to_device(plan.stage, position.device), to_device(plan.within, position.device)
        dominant = len(position) - len(plan.merged_places)
        inside = torch.cat([position[:dominant], within])
        of_thumbnail = to_device(plan.in_first_tile, position.device)[position[:dominant]]
        stages = torch.cat([torch.where(of_thumbnail, 1, 3), stage])
        return ((image_of[position] << 50) + (stages << 46) + inside).argsort()


def _projected(batch: VisualBatch, rows: Tensor) -> Tensor:
    assert batch.project is not None
    return batch.project(rows)
