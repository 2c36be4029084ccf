"""VidCom2: more tokens for frames unlike the rest of the video, and in each frame the least common ones."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import VIDEOS, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.frames import frame_pieces, videos_of
from vlmprune.methods.shared.video_budget import ROUNDINGS, Rounding, video_tokens

WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1.0, 2.0)
TEMPERATURE = 0.01


@dataclass(frozen=True, kw_only=True)
class VidCom2(InputMethod):
    """Keep the tokens least like their frame and their video, more of them in frames unlike the others.

    Only the half of the channels that varies least over the video counts, each token normalised there. Similarity to a centre
    (the mean over the video, and over the frame) is a sum of Gaussians of the distance with variances 1/8 to 2. A frame
    whose tokens are on average less like the video's centre than those of other frames gets more of the budget, by a softmax of
    temperature 0.01 and at most twice the average; in each frame the tokens with the lowest sum of both similarities stay.
    Then, so that `keep` is met exactly, the most similar of the kept tokens of all frames go, or the least similar of the
    dropped ones come back. Kept tokens keep their values, and their positions as the family's default says (the
    M-RoPE ids of the full prompt; compacted ids in 1-D families). Newlines, timestamps and vision markers stay.

    At least one token a frame is kept, and all of the video with `keep=1.0`. Images beside a video stay as they are, calls
    with images alone are refused.

    Source: "Video Compression Commander: Plug-and-Play Inference Acceleration for Video Large Language Models", EMNLP 2025,
    arXiv 2505.14454. The choice of channels is the official code's; the paper speaks of the rest. The exact budget is vLLM's
    port; the official code rounds every frame's share by itself, drifts by a few tokens and drops some with a share of 1:
    `faithful=True`. vLLM truncates the budget (`rounding="down"`). Official scores are in the model's dtype, here in fp32;
    ties go to the lowest index. The official wrapper for Qwen compresses nothing if a batch has more than one row.

    Eight frames are in fp32 at a time, so beside the features themselves it takes less memory than they do.

    Attributes:
        keep: R of the paper (0.25 there too, also 0.15), or the number of tokens per video.
        faithful: the official budgets per frame, whose sum is near `keep` only.
        rounding: "nearest" or "down", how the budget of the exact form is rounded.
    """

    faithful: bool = False
    rounding: Rounding = "nearest"

    name: ClassVar[str] = "vidcom2"
    needs: ClassVar[frozenset[Need]] = frozenset({VIDEOS})
    symbols: ClassVar[Mapping[str, str]] = {
        "R": "keep=R",
        "R_RATIO": "keep=R_RATIO",
        "base_scale": "keep=base_scale",
        "video_retention_ratio": "keep=video_retention_ratio",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_flag("faithful", self.faithful)
        check_choice("rounding", self.rounding, ROUNDINGS)

    def video_budget(self, frames: int, frame_tokens: int) -> int:
        """Return `keep` of all tokens, and one a frame at least."""
        return video_tokens(self.keep, frames * frame_tokens, frames, self.rounding)

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` tokens of each video."""
        kept, counts = [], []
        for video, budget in zip(videos_of(batch), batch.budgets, strict=True):
            scores = vidcom2_scores(video)
            share = self.keep if isinstance(self.keep, float) else budget / scores.video.numel()
            chosen = least_similar(scores, frame_counts(scores.video, share))
            if not self.faithful:
                chosen = exactly(chosen, scores, budget)
                kept.append(chosen.flatten().to(torch.int8).argsort(descending=True, stable=True)[:budget])
            else:
                kept.append(chosen.flatten().nonzero().flatten())
            counts.append(len(kept[-1]))
        return Selection(torch.cat(kept), tuple(counts))

    def feature_macs(self, scored: Scored) -> int:
        """The variances of the channels, the lengths of their half, and two distances to centres in it."""
        return sum(total * (scored.dim + 3 * (scored.dim // 2)) for total, kept in scored.images if kept < total)


class SimilarityScores(NamedTuple):
    """How common tokens are.

    Attributes:
        video: similarity to the centre of the video, fp32 `[frames, tokens]`.
        frame: similarity to the centre of the frame, fp32 `[frames, tokens]`.
    """

    video: Tensor
    frame: Tensor


def steady_channels(video: Tensor) -> Tensor:
    """Return the half of the channels of `video [frames, tokens, dim]` that varies least over all its tokens, int64."""
    tokens = video.shape[0] * video.shape[1]
    mean = torch.zeros(video.shape[2], dtype=torch.float64, device=video.device)
    for _, piece in frame_pieces(video):
        mean += piece.sum((0, 1))
    mean = (mean / tokens).float()
    spread = torch.zeros_like(mean)
    for _, piece in frame_pieces(video):
        spread += (piece - mean).square_().sum((0, 1))
    return spread.argsort(stable=True)[: max(1, video.shape[2] // 2)]


def vidcom2_scores(video: Tensor) -> SimilarityScores:
    """Return the similarity of every token of `video [frames, tokens, dim]` to the centres of the video and of its frame."""
    channels = steady_channels(video)
    centres = torch.cat([normalize(piece[..., channels], dim=-1).mean(1) for _, piece in frame_pieces(video)])
    centre = centres.mean(0)
    to_video = torch.empty(video.shape[:2], device=video.device)
    to_frame = torch.empty_like(to_video)
    for frames, piece in frame_pieces(video):
        unit = normalize(piece[..., channels], dim=-1)
        to_video[frames] = _similarity(unit, centre)
        to_frame[frames] = _similarity(unit, centres[frames, None])
    return SimilarityScores(to_video, to_frame)


def frame_scales(to_video: Tensor, share: float) -> Tensor:
    """Return the share of each frame that stays, fp32 `[frames]`, from its tokens' similarity `[frames, tokens]` to the video."""
    unlike = -to_video.mean(1)
    weights = ((unlike - unlike.max()) / TEMPERATURE).softmax(0)
    return (share * (1 + weights - weights.mean())).clamp(max=1)


def frame_counts(to_video: Tensor, share: float) -> Tensor:
    """Return how many tokens each frame keeps, int64 `[frames]`, one at least."""
    tokens = to_video.shape[1]
    return (frame_scales(to_video, share) * tokens).round().long().clamp(1, tokens)


def least_similar(scores: SimilarityScores, counts: Tensor) -> Tensor:
    """Return which tokens stay, bool `[frames, tokens]`: the `counts [frames]` of each frame with the lowest similarities."""
    order = (scores.video + scores.frame).argsort(dim=1, stable=True)
    return order.argsort(dim=1) < counts[:, None]


def exactly(chosen: Tensor, scores: SimilarityScores, budget: int) -> Tensor:
    """Return `chosen [frames, tokens]` without its most similar tokens, or with the least similar others: `budget` in all."""
    rising = (scores.video + scores.frame).flatten().argsort(stable=True)
    chosen_first = rising[chosen.flatten()[rising].to(torch.int8).argsort(descending=True, stable=True)]
    exact = torch.zeros(chosen.numel(), dtype=torch.bool, device=chosen.device)
    return exact.index_fill_(0, chosen_first[:budget], True).view_as(chosen)


def _similarity(unit: Tensor, centre: Tensor) -> Tensor:
    squared = (unit - centre).square().sum(-1)
    return torch.stack([(-squared / (2 * width)).exp() for width in WIDTHS]).sum(0)
