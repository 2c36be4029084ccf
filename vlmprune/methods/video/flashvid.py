"""FlashVID: tokens picked in every frame, and trees over time of the others, clustered in space."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_int, check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import TOWER_ATTENTION, VIDEOS, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.frame_segments import even_shares
from vlmprune.methods.shared.video_rows import VideoRows, frames_of, in_position_order, select_videos

from .flashvid_tree import Picking, flashvid_clusters, flashvid_picks, flashvid_segments, flashvid_trees

_PICKINGS = ("attention_diversity", "attention_diversity_relevance", "diversity", "attention")


class FramePlan(NamedTuple):
    """Tokens that each frame of a video keeps.

    Attributes:
        picked: of these, picked and kept as they are.
        clustered: of these, clusters of the others; only their sum over a scene is kept to.
    """

    picked: tuple[int, ...]
    clustered: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class FlashVID(InputMethod):
    """Keep tokens of every frame that are attended to and unlike each other, and merge the others over time and space.

    A video is cut in scenes where the mean tokens of neighbouring frames have a cosine below `segment_threshold`, and where
    they are least alike until there are `min_segments`. The budget is spread evenly over the frames. In each of them the
    share `alpha` of it is picked greedily: the next token has the largest product of its attention (of the relevance to
    its scene too, by `picking`) and its cosine distance to the picks. Of the others, each joins the most similar one of the
    frame before in the same scene if their cosine exceeds `temporal_threshold`, or the most similar ones of a scene alone
    where too few would be left. What joined is a tree, and its root gets its mean. The roots left in a frame are put in
    clusters around density peaks (DPC-kNN), each going to the nearest peak, and a cluster is the mean of its roots.

    A cluster takes the position (and M-RoPE id) of its centre, and the tokens come in position order. Deepstack features are
    those of the kept tokens themselves, unmerged, as in the official code.

    `keep` counts the tokens that enter the language model, and is met exactly. The paper's setting drops once more inside
    it: `[FlashVID(keep=0.25), FastV(layer=20, ratio=0.7, rounding="ceil")]` is its 20 % of 28 layers, where 1.25 times as
    many tokens enter.

    Attributes:
        keep: tokens that enter the language model; the paper's r times the official expansion of 1.25.
        alpha: share of the budget that is picked, in [0, 1]; the paper's 0.7.
        temporal_threshold: cosine above which a token joins one of the frame before; the paper's 0.8.
        segment_threshold: cosine of mean tokens below which a scene ends; the paper's 0.9. None for one scene.
        min_segments: scenes at least; None for the official 8, or 4 where the tower merges patches (Qwen).
        complementary: whether videos are cut further until there are `min_segments`.
        picking: "attention_diversity_relevance" (the official `attn_div_v2`), "attention_diversity" (`attn_div`),
            "diversity" (`div`) or "attention" (`attn`); None for the first, or the second where the tower merges patches, as in
            the official code.
        faithful: the official arithmetic: counts are rounded up in every frame, so that more than `keep` stays; a tree gets its
            sum divided by one more than the tokens that joined its root directly; none of equally similar tokens joins where
            one is too many; in scenes of one frame picked tokens are merged too.

    Source: "FlashVID: Efficient Video Large Language Models via Training-free Tree-based Spatiotemporal Token Merging", ICLR
    2026, arXiv 2602.08024. The paper makes every tree one average token; the official code divides by too little where trees
    are deeper than one frame (see `faithful`). There the relevance may be negative, and then tokens are picked twice; here
    they have relevance 0. In scenes of one frame its picked tokens also go in the clusters, and may stay twice, raw and as
    a centre; here they do not, and with `faithful` the raw one stays. The official noise on densities, which breaks
    ties at random, is the lowest index here.
    """

    alpha: float = 0.7
    temporal_threshold: float = 0.8
    segment_threshold: float | None = 0.9
    min_segments: int | None = None
    complementary: bool = True
    picking: Picking | None = None
    faithful: bool = False

    name: ClassVar[str] = "flashvid"
    needs: ClassVar[frozenset[Need]] = frozenset({VIDEOS, TOWER_ATTENTION})
    merges: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {
        "r": "keep=r * expansion",
        "retention_ratio": "keep=retention_ratio * expansion",
        "expansion": "keep=retention_ratio * expansion",
        "do_segment": "segment_threshold=None for one scene",
        "min_segment_num": "min_segments=",
        "complementary_segment": "complementary=",
        "token_selection_method": "picking=",
        "pruning_layer": "FastV(layer=...) beside it",
        "llm_retention_ratio": "FastV(ratio=1 - llm_retention_ratio, rounding='ceil') beside it",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "[0, 1]", "the share of the budget that is picked")
        check_number("temporal_threshold", self.temporal_threshold, "[-1, 1]", "a cosine")
        if self.segment_threshold is not None:
            check_number(
                "segment_threshold", self.segment_threshold, "[-1, 2)", "a cosine; above 1 every frame is a scene"
            )
        if self.min_segments is not None:
            check_int("min_segments", self.min_segments, 1)
        check_flag("complementary", self.complementary)
        check_flag("faithful", self.faithful)
        if self.picking is not None:
            check_choice("picking", self.picking, _PICKINGS)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention of the feature layer."""
        return (tower.attention(tower.feature_layer),)

    def select(self, batch: VisualBatch) -> Selection:
        """Keep `budgets[i]` tokens of each video; with `faithful` as many as the official code."""
        (signal,) = self.vision_signals(batch.tower)
        attention = batch.vision[signal].float().mean(-1)
        merging = batch.tower.patches_per_token > 1
        picking = self.picking or ("attention_diversity" if merging else "attention_diversity_relevance")
        minimum = self.min_segments or (4 if merging else 8)

        def rows(video: int) -> VideoRows:
            features, span = frames_of(batch, video)
            lengths = flashvid_segments(features, self.segment_threshold, minimum, self.complementary)
            plan = self.plan(len(features), features.shape[1], batch.budgets[video])
            return self.merge(features, attention[span].view(features.shape[:2]), lengths, plan, picking)

        return select_videos(batch, rows)

    def plan(self, frames: int, tokens: int, budget: int) -> FramePlan:
        """Return how many tokens each of `frames` frames of `tokens` tokens keeps."""
        shares = [min(tokens, -(-budget // frames))] * frames if self.faithful else even_shares(budget, frames)
        picked = [min(share, ceil(share * self.alpha)) for share in shares]
        return FramePlan(tuple(picked), tuple(share - pick for share, pick in zip(shares, picked, strict=True)))

    def merge(
        self, features: Tensor, attention: Tensor, lengths: Sequence[int], plan: FramePlan, picking: Picking
    ) -> VideoRows:
        """Return what is kept of one video.

        Args:
            features: `[frames, tokens, dim]`.
            attention: fp32 `[frames, tokens]`.
            lengths: frames per scene.
            plan: tokens per frame.
            picking: by what tokens are picked.
        """
        official = self.official_rows(features, attention, lengths, plan, picking)
        picked, centres, values, groups = official
        if self.faithful:
            # A token is in the sequence once.
            fresh = ~torch.isin(centres, picked)
            place = torch.where(fresh, fresh.cumsum(0) - 1, -1)
            groups = torch.where(groups < 0, groups, place[groups.clamp(min=0)]) if len(place) else groups
            centres, values, picked = centres[fresh], values[fresh], picked.unique()
        packed = features.flatten(0, 1)
        own = torch.where(groups < 0, groups, groups + len(picked))
        own[picked] = torch.arange(len(picked), device=picked.device)
        kept = torch.cat([picked, centres])
        return in_position_order(kept, torch.cat([packed[picked].float(), values]), own)

    def official_rows(
        self, features: Tensor, attention: Tensor, lengths: Sequence[int], plan: FramePlan, picking: Picking
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the picked tokens, the centres of the clusters, their values, and the cluster of every token (-1 for none)."""
        frames, tokens, dim = features.shape
        device = features.device
        local = flashvid_picks(features, attention, plan.picked, lengths, picking, repeats=self.faithful)
        starts = torch.arange(0, frames * tokens, tokens, device=device)
        picked = local + starts.repeat_interleave(torch.tensor(plan.picked, device=device), output_size=len(local))
        if not any(plan.clustered):
            none = picked.new_zeros(0)
            return picked, none, torch.zeros(0, dim, device=device), torch.full((frames * tokens,), -1, device=device)
        free = torch.ones(frames * tokens, dtype=torch.bool, device=device).index_fill_(0, picked, False)
        free = free.view(frames, tokens)
        picks, clusters = _per_scene(plan.picked, lengths), _per_scene(plan.clustered, lengths)
        budgets = [pick + cluster for pick, cluster in zip(picks, clusters, strict=True)]
        trees = flashvid_trees(features, free, lengths, self.temporal_threshold, budgets, strict=self.faithful)
        left = free & ~trees.merged
        if self.faithful:
            single = [length == 1 for length in lengths for _ in range(length)]
            left = left | torch.tensor(single, device=device)[:, None]
        found = flashvid_clusters(features, trees, left, lengths, clusters, self.faithful)
        # A picked token's tree is itself alone.
        outside = torch.ones_like(found.groups, dtype=torch.bool) if self.faithful else (free | left).flatten()
        return picked, found.centres, found.values, torch.where(outside, found.groups, -1)

    def feature_macs(self, scored: Scored) -> int:
        """Cosines within frames, between neighbouring frames, and the distances of the roots among each other, at most."""
        frames = max(1, scored.tiles)
        return sum(3 * total * total // frames * scored.dim for total, kept in scored.images if kept < total)


def _per_scene(counts: Sequence[int], lengths: Sequence[int]) -> list[int]:
    ends = torch.tensor([0, *counts]).cumsum(0)[torch.tensor([0, *lengths]).cumsum(0)]
    sums: list[int] = ends.diff().tolist()
    return sums
