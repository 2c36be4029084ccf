"""HoliTom: places that stay alike through windows of frames are kept once; of the others those that are attended to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from vlmprune.budget import Keep
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.base import Method
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_int, check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.layer.holitom_merge import HoliTomMerge
from vlmprune.methods.layer_method import check_layers
from vlmprune.methods.needs import TOWER_ATTENTION, VIDEOS, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.apportion import apportion
from vlmprune.methods.shared.video_rows import VideoRows, frames_of, in_position_order, select_videos

from .holitom_windows import Windows, holitom_windows, merge_still_places


class HoliTomPlan(NamedTuple):
    """Tokens that a video keeps.

    Attributes:
        still: clusters of still places per window.
        moving: tokens of the other places per frame.
        ratio: share of what is left after still places are kept once, of which these are made.
    """

    still: tuple[int, ...]
    moving: tuple[int, ...]
    ratio: float


@dataclass(frozen=True, kw_only=True)
class HoliTom(InputMethod):
    """Keep places that do not change once for a window of frames, clustered, and of the others the most attended tokens.

    A place is still between two frames if the cosine of its two tokens exceeds `tau`, and in a window if it is still between
    all its frames. The windows are those that save most tokens if every still place is kept once a window. What is left
    shares the budget in proportion: the still places of a window, averaged over its frames, are put in clusters around
    density peaks (DPC-kNN), and a cluster is `beta` times its centre and `1 - beta` times the mean of the others; of the
    other places every frame keeps the tokens with the highest attention received, as they are.

    A cluster takes the position (and M-RoPE id) of its centre in the first frame of its window, and tokens come in position
    order. `order="official"` puts the clusters of a window before its other tokens, as values in the same kept positions: the
    official order for LLaVA-OneVision, whose positions are counted anew. Deepstack features are those of the kept tokens
    themselves.

    `keep` counts the tokens that enter the language model and is met, except where still places kept once leave fewer than
    that: a clip that stands still keeps one frame of tokens at most. The paper drops once more inside the language model:
    `inner_layer` adds that step (`HoliTomMerge`), which folds what it drops into what it keeps; `keep` then still counts
    what enters, and images beside a video, which enter whole, are cut by that step too. Without folding it is
    `[HoliTom(keep=...), FastV(layer=18, ratio=0.5)]`.

    Attributes:
        keep: the paper's r; 0.1 to 0.25 there, 0.25 here.
        tau: cosine above which a place is still; the paper's 0.8, and 0.65 for 10 % of the tokens.
        beta: share of the centre in its cluster; the official 0.6.
        neighbours: the official K, tokens that a density is taken over, at most; 7.
        max_window: frames of a window at most; the official 1024.
        inner_layer: the official HOLITOM_k, the 0-based layer of the inner step (18 of 28, 60 of 80 layers); None for none.
        inner_ratio: the official HOLITOM_r, share of what entered that the inner step drops; 0.5.
        order: "position" or "official".
        faithful: the official counts: the share of still places is rounded half to even in every window, that of other places
            rounded up in every frame, so that another number than `keep` stays.

    Source: "HoliTom: Holistic Token Merging for Fast Video Large Language Models", NeurIPS 2025, arXiv 2505.21334. The paper
    also merges tokens that change (dominant and contextual ones); the released code cannot, and keeps the most attended
    ones, as here. It breaks ties of densities at random, here the lowest index wins. It serves LLaVA-OneVision and
    LLaVA-Video; on Qwen's models a frame is a temporal patch here.
    """

    tau: float = 0.8
    beta: float = 0.6
    neighbours: int = 7
    max_window: int = 1024
    inner_layer: int | None = None
    inner_ratio: float = 0.5
    order: Literal["position", "official"] = "position"
    faithful: bool = False

    name: ClassVar[str] = "holitom"
    needs: ClassVar[frozenset[Need]] = frozenset({VIDEOS, TOWER_ATTENTION})
    merges: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {
        "r": "keep=r",
        "retain_ratio": "keep=retain_ratio",
        "K": "neighbours=K",
        "HOLITOM_k": "inner_layer=HOLITOM_k",
        "HOLITOM_r": "inner_ratio=HOLITOM_r",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("tau", self.tau, "[-1, 2)", "a cosine; above 1 nothing is still")
        check_number("beta", self.beta, "[0, 1]", "the share of the centre in its cluster")
        check_int("neighbours", self.neighbours, 1)
        check_int("max_window", self.max_window, 1)
        check_choice("order", self.order, ("position", "official"))
        check_flag("faithful", self.faithful)
        check_number("inner_ratio", self.inner_ratio, "[0, 1)", "the share that is dropped")
        if self.inner_layer is not None:
            check_layers("inner_layer", (self.inner_layer,))

    def parts(self) -> tuple[Method, ...]:
        """Return this first stage, and the inner one where it is asked for and something is to be dropped."""
        if self.inner_layer is None or self.keep == 1.0:
            return (self,)
        return (self, HoliTomMerge(layer=self.inner_layer, ratio=self.inner_ratio))

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention of the feature layer."""
        return (tower.attention(tower.feature_layer),)

    def select(self, batch: VisualBatch) -> Selection:
        """Keep `budgets[i]` tokens of each video, fewer where still places leave fewer."""
        (signal,) = self.vision_signals(batch.tower)
        attention = batch.vision[signal].float().mean(-1)

        def rows(video: int) -> VideoRows:
            features, span = frames_of(batch, video)
            windows = holitom_windows(features, self.tau, self.max_window)
            plan = self.plan(windows, features.shape[1], self.keep if self.faithful else batch.budgets[video])
            return self.merge(features, attention[span].view(features.shape[:2]), windows, plan)

        return select_videos(batch, rows)

    def plan(self, windows: Windows, tokens: int, keep: Keep) -> HoliTomPlan:
        """Return how many tokens each window and frame keeps of frames of `tokens` tokens.

        Args:
            windows: the windows.
            tokens: tokens of a frame.
            keep: tokens of the video to keep, as a number; with `faithful` also as a share.
        """
        still: list[int] = windows.still.sum(1).tolist()
        moving = [tokens - count for count, length in zip(still, windows.lengths, strict=True) for _ in range(length)]
        total = tokens * len(moving)
        share = keep if isinstance(keep, float) else keep / total
        ratio = min(share / ((total - windows.saved) / total), 1.0)
        if self.faithful:
            kept = [round(count * ratio) for count in still], [ceil(count * ratio) for count in moving]
            return HoliTomPlan(tuple(kept[0]), tuple(kept[1]), ratio)
        room = torch.tensor([still + moving])
        shares: list[int] = apportion(torch.tensor([int(keep)]), room.double(), room)[0].tolist()
        return HoliTomPlan(tuple(shares[: len(still)]), tuple(shares[len(still) :]), ratio)

    def merge(self, features: Tensor, attention: Tensor, windows: Windows, plan: HoliTomPlan) -> VideoRows:
        """Return what is kept of one video.

        Args:
            features: `[frames, tokens, dim]`.
            attention: fp32 `[frames, tokens]`.
            windows: its windows.
            plan: tokens per window and frame.
        """
        frames, tokens, _ = features.shape
        device, packed = features.device, features.flatten(0, 1)
        clusters = merge_still_places(features, windows, plan.still, self.beta, self.neighbours)
        lengths = torch.tensor(windows.lengths, device=device)
        still = windows.still.repeat_interleave(lengths, dim=0, output_size=frames)
        scores = attention.masked_fill(still, -torch.inf).flatten()
        moving = segmented_topk(scores, range(0, frames * tokens + 1, tokens), plan.moving)
        starts = torch.arange(0, frames * tokens, tokens, device=device)
        moving = moving + starts.repeat_interleave(torch.tensor(plan.moving, device=device), output_size=len(moving))
        groups = clusters.groups.clone()
        groups[moving] = torch.arange(len(moving), device=device) + len(clusters.centres)
        kept = torch.cat([clusters.centres, moving])
        values = torch.cat([clusters.values, packed[moving].float()])
        rows = in_position_order(kept, values, groups)
        if self.order == "position":
            return rows
        # The official order: windows in order, in each the clusters first; these are in position order already.
        window = torch.arange(len(lengths), device=device).repeat_interleave(lengths, output_size=frames)
        rank = window[kept // tokens] * 2 + (torch.arange(len(kept), device=device) >= len(clusters.centres))
        order = (rank * frames * tokens + kept).argsort()
        place = torch.empty_like(order).index_copy_(0, order, torch.arange(len(order), device=device))
        return VideoRows(rows.kept, values[order], torch.where(groups < 0, groups, place[groups.clamp(min=0)]))

    def feature_macs(self, scored: Scored) -> int:
        """Cosines of neighbouring frames, and the distances among still places, those of one frame at most."""
        frames = max(1, scored.tiles)
        return sum((total + (total // frames) ** 2) * scored.dim for total, kept in scored.images if kept < total)
