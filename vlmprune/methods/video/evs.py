"""EVS: the tokens of a video that differ most from the same place one frame before."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.checks import check_choice
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import VIDEOS, Need
from vlmprune.methods.selection_macs import Scored, one_cosine_macs
from vlmprune.methods.shared.frames import FRAMES_AT_A_TIME, videos_of
from vlmprune.methods.shared.video_budget import ROUNDINGS, Rounding, video_tokens

# What every token of the first frame scores, above any other.
FIRST_FRAME = 255.0


@dataclass(frozen=True, kw_only=True)
class EVS(InputMethod):
    """Keep the tokens of a video that changed most since the frame before.

    The score is 1 minus the cosine between a visual token and the one at the same place one frame earlier (a frame of a
    Qwen-VL model is a merged pair of frames). Every token of the first frame scores 255. The highest scores of the whole
    video stay, ties go to the earliest; so a frame may keep nothing, and one behind a cut all of it. Kept tokens keep their
    values, and their positions as the family's default says (the M-RoPE ids of the full prompt; compacted ids in 1-D
    families). Timestamps and vision markers between frames are text and stay.

    The budget is `keep` of the video's tokens, but never less than one frame, which is then the first: with 4 frames and
    `keep=0.2` nothing of the other three remains. `last_run(model).videos[i].kept_per_frame` says what stayed. A video of one
    frame is kept whole. Images beside a video stay as they are, calls with images alone are refused.

    Source: "Efficient Video Sampling: Pruning Temporally Redundant Tokens for Faster VLM Inference", arXiv 2510.14624, as
    vLLM serves it. The paper compares RGB patches and cuts at a percentile; the official code compares embeddings and keeps
    the highest, as here. The official code scores in the model's dtype: in bf16 most differences of a slow video tie, and the
    earliest frames win (39 of 72 tokens agree with fp32 in one test case); here scores are fp32 by default. It truncates the
    budget (`rounding="down"`), here it is rounded as everywhere. transformers' Nemotron takes all videos of a call for one;
    here each video has its own budget and first frame.

    Nine frames are in fp32 at a time, so beside the features themselves it takes less memory than they do.

    Attributes:
        keep: 1 - q of the paper, the pruning rate (0.25 here and in vLLM's examples, q = 0.75; Nemotron Nano was trained with
            q = 0.7), or the number of tokens per video.
        dtype: "float32", or "model" for scores in the dtype of the features as the official code has them.
        rounding: "nearest" or "down", how the budget is rounded.
    """

    dtype: Literal["float32", "model"] = "float32"
    rounding: Rounding = "nearest"

    name: ClassVar[str] = "evs"
    needs: ClassVar[frozenset[Need]] = frozenset({VIDEOS})
    symbols: ClassVar[Mapping[str, str]] = {
        "q": "keep=1 - q",
        "video_pruning_rate": "keep=1 - video_pruning_rate",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("dtype", self.dtype, ("float32", "model"))
        check_choice("rounding", self.rounding, ROUNDINGS)

    def video_budget(self, frames: int, frame_tokens: int) -> int:
        """Return `keep` of all tokens, and one frame at least."""
        return video_tokens(self.keep, frames * frame_tokens, frame_tokens, self.rounding)

    def select(self, batch: VisualBatch) -> Selection:
        """Take the highest scores, `budgets[i]` of each video."""
        scores = torch.cat([evs_score(video, self.dtype == "model").flatten() for video in videos_of(batch)])
        kept = segmented_topk(scores, batch.offsets, batch.budgets)
        return Selection(kept, batch.budgets, scores=scores)

    def feature_macs(self, scored: Scored) -> int:
        """One cosine a token."""
        return one_cosine_macs(scored)


def evs_score(video: Tensor, in_model_dtype: bool = False) -> Tensor:
    """Return 1 minus the cosine of each token of `video [frames, tokens, dim]` with its predecessor, `[frames, tokens]`."""
    scores = torch.full(video.shape[:2], FIRST_FRAME, dtype=torch.float32, device=video.device)
    for begin in range(1, len(video), FRAMES_AT_A_TIME):
        # One frame more, to compare the first with.
        piece = video[begin - 1 : begin + FRAMES_AT_A_TIME]
        piece = piece if in_model_dtype else piece.float()
        scores[begin : begin + FRAMES_AT_A_TIME] = (1 - cosine_similarity(piece[1:], piece[:-1], dim=-1)).float()
    return scores
