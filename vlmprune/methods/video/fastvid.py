"""FastVID: attended tokens of every frame, and density peaks of some that take in the rest of their scene."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_int, check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import TOWER_ATTENTION, VIDEOS, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.frame_segments import neighbour_cosines
from vlmprune.methods.shared.video_rows import VideoRows, frames_of, in_position_order, select_videos

from .fastvid_merge import context_centres, local_to_video, merge_into_centres
from .fastvid_plan import Form, FrameShares, anchors_of, exact_shares, fastvid_scenes, official_shares, shown_frames

_FORMS = ("qwen", "video", "onevision")


@dataclass(frozen=True, kw_only=True)
class FastVID(InputMethod):
    """Keep the most attended tokens of every frame of a scene, and merge the others into density peaks of its anchor frames.

    A video is cut in scenes where the cosine of the mean tokens of neighbouring frames is below `tau`, and where they are
    least alike until there are `scenes`. Each scene gets its part of the budget by its length; the share `context` of it goes to
    its anchors, the last frame and every `step`-th before it. The other part is spread over the frames, which keep their most
    attended tokens as they are. An anchor's centres are the density peaks of its other tokens. What the scene does not keep is
    merged into them: every token goes, once for each anchor, to the centre of highest cosine, and a centre with `m` tokens
    becomes `w` times itself and `1 - w` times their mean, `w` the larger of `1 / (m + 1)` and `beta`.

    In the default form, of the official code for Qwen2.5-VL, only the last of neighbouring frames that are as alike as
    `ignore` keeps anything; the others are merged.

    A centre keeps its position (and M-RoPE id), and the tokens come in position order. Deepstack features are those of the
    kept tokens themselves. `last_run` names for every merged token the centre that it is most like.

    `keep` is met exactly, except where the frames that keep anything have fewer tokens: a clip that stands still keeps one
    frame of tokens a scene at most.

    Attributes:
        keep: the paper's r; 0.1 for LLaVA and 0.27 for Qwen2.5-VL there, 0.25 here.
        scenes: the paper's c, scenes at least, as far as there are frames; 8.
        tau: cosine of mean tokens below which a scene ends; None for the official 0.84 of the form "qwen", 0.9 of the others.
        ignore: cosine from which on a frame counts as the next one again; the official 0.95. None for never, as in the other
            forms.
        context: the paper's d, share of the budget that is merged into; 0.4.
        step: the paper's p, from one anchor to the next; 4.
        beta: least weight of a centre; 0.6.
        form: whose arithmetic: "qwen", "video" (LLaVA-Video) or "onevision"; in the last an anchor's own centres are among the
            tokens that are merged, and where every frame is an anchor each takes its own tokens only.
        faithful: the official counts, from `int(frame tokens * keep)` a frame: rounding and caps lose some of the budget.

    Source: "FastVID: Dynamic Density Pruning for Fast Video Large Language Models", NeurIPS 2025, arXiv 2503.11187. The official
    codes for LLaVA score frames and tokens by the pooling head of SigLIP, which transformers' LLaVA-OneVision does not have: here
    attention is what the tower's feature layer gives (CLS attention, or attention received), and a frame is its mean token, so
    published LLaVA results are not reproduced. On Qwen's models the attention is that of the mean query of a frame, as in its
    official code. That code fails on videos of fewer frames than `scenes`, on `context=0` and where an anchor has fewer than 4
    other tokens; here these work. It breaks ties of densities at random, here the lowest index wins.
    """

    scenes: int = 8
    tau: float | None = None
    ignore: float | None = 0.95
    context: float = 0.4
    step: int = 4
    beta: float = 0.6
    form: Form = "qwen"
    faithful: bool = False

    name: ClassVar[str] = "fastvid"
    needs: ClassVar[frozenset[Need]] = frozenset({VIDEOS, TOWER_ATTENTION})
    merges: ClassVar[bool] = True
    symbols: ClassVar[Mapping[str, str]] = {
        "r": "keep=r",
        "retention_ratio": "keep=retention_ratio",
        "c": "scenes=c",
        "d": "context=d",
        "p": "step=p",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("scenes", self.scenes, 1)
        for name in ("tau", "ignore"):
            if getattr(self, name) is not None:
                check_number(name, getattr(self, name), "[-2, 2)", "a cosine")
        check_number("context", self.context, "[0, 1]", "the share of the budget that is merged into")
        check_int("step", self.step, 1)
        check_number("beta", self.beta, "[0, 1]", "the least weight of a centre")
        check_choice("form", self.form, _FORMS)
        check_flag("faithful", self.faithful)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention of the feature layer; of the mean query where the tower merges patches."""
        if tower.patches_per_token > 1:
            return (VisionSignal("mean_query_attention", tower.feature_layer),)
        return (tower.attention(tower.feature_layer),)

    def select(self, batch: VisualBatch) -> Selection:
        """Keep `budgets[i]` tokens of each video, fewer where its frames are too alike."""
        (signal,) = self.vision_signals(batch.tower)
        attention = batch.vision[signal].float().mean(-1)

        def rows(video: int) -> VideoRows:
            features, span = frames_of(batch, video)
            frames = torch.stack([frame.float().mean(0) for frame in features])
            alike: list[float] = neighbour_cosines(frames).tolist()
            lengths = self.lengths(alike)
            shares = self.shares(alike, lengths, features.shape[1], batch.budgets[video])
            return self.merge(features, attention[span].view(features.shape[:2]), lengths, shares)

        return select_videos(batch, rows)

    def lengths(self, alike: Sequence[float]) -> tuple[int, ...]:
        """Return the frames of each scene, from the cosine of every frame and the next one."""
        return fastvid_scenes(
            alike, self.scenes, (0.84 if self.form == "qwen" else 0.9) if self.tau is None else self.tau
        )

    def shares(self, alike: Sequence[float], lengths: Sequence[int], tokens: int, budget: int) -> FrameShares:
        """Return how many tokens each frame keeps.

        Args:
            alike: cosine of every frame and the next one.
            lengths: frames per scene.
            tokens: tokens of a frame.
            budget: tokens of the video.
        """
        shown = shown_frames(alike, lengths, self.ignore if self.form == "qwen" else None)
        if not self.faithful:
            return exact_shares(tokens, budget, self.context, shown, lengths, self.step)
        of_frame = int(tokens * self.keep) if isinstance(self.keep, float) else budget // sum(lengths)
        return official_shares(self.form, tokens, of_frame, self.context, shown, lengths, self.step)

    def merge(self, features: Tensor, attention: Tensor, lengths: Sequence[int], shares: FrameShares) -> VideoRows:
        """Return what is kept of one video.

        Args:
            features: `[frames, tokens, dim]`.
            attention: fp32 `[frames, tokens]`.
            lengths: frames per scene.
            shares: tokens per frame.
        """
        frames, tokens, _ = features.shape
        device, packed = features.device, features.flatten(0, 1)
        salient = self.salient(attention, shares)
        mask = torch.zeros(frames * tokens, dtype=torch.bool, device=device).index_fill_(0, salient, True)
        mask = mask.view(frames, tokens)
        centres = context_centres(features, mask, shares.context)
        alone = self._anchors_alone(lengths, shares)
        merged = merge_into_centres(
            features, mask, centres, shares.context, lengths, alone, self.beta, with_centres=self.form == "onevision"
        )
        groups = torch.where(merged.nearest < 0, -1, merged.nearest + len(salient))
        groups[salient] = torch.arange(len(salient), device=device)
        return in_position_order(
            torch.cat([salient, centres]), torch.cat([packed[salient].float(), merged.values]), groups
        )

    def salient(self, attention: Tensor, shares: FrameShares) -> Tensor:
        """Return the most attended tokens of each frame, int64 indices of the video, ascending."""
        tokens = attention.shape[1]
        local = segmented_topk(attention.flatten(), range(0, attention.numel() + 1, tokens), shares.salient)
        return local_to_video(local, shares.salient, tokens)

    def _anchors_alone(self, lengths: Sequence[int], shares: FrameShares) -> list[bool]:
        """Whether the anchors of each scene take their own frame's tokens only: where one has no more than a frame's share."""
        if self.form != "onevision":
            return [False] * len(lengths)
        alone, first = [], 0
        for length in lengths:
            anchors = len(anchors_of(range(length), self.step))
            last = shares.context[first + length - 1]
            # The official test is `of_frame * length // anchors == of_frame`, true also of small shares.
            of_frame = -(-last * anchors // length)
            alone.append(of_frame * length // anchors == of_frame if self.faithful else anchors == length)
            first += length
        return alone

    def feature_macs(self, scored: Scored) -> int:
        """The distances in anchor frames and the cosines of tokens with centres, of scenes that the cut into `scenes` gives."""
        macs, frames = 0, max(1, scored.tiles)
        for total, kept in scored.images:
            if kept < total:
                scenes = min(self.scenes, frames)
                centres = round(kept * self.context)
                anchors = -(-frames // self.step)
                macs += (total + anchors * (total // frames) ** 2 + centres * total // scenes) * scored.dim
        return macs
