"""HAWK: tokens that the question asks for in the first layer, heads weighted by how much the model needs them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil
from os import PathLike
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.budget import token_budget
from vlmprune.kernels.row_attention import row_attention
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.checks import check_choice, check_int
from vlmprune.methods.input.hawk_weights import check_head_count, check_weights, shipped_weights
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import FIRST_LAYER, STILL_IMAGES, Need
from vlmprune.methods.selection_macs import Scored

Normalization = Literal["l2", "softmax", "minmax"]


@dataclass(frozen=True, kw_only=True)
class HAWK(InputMethod):
    """Keep the tokens whose keys in the first decoder layer answer the question's queries, without rotary positions.

    Per head the logits are averaged over the question, normalised over the image's tokens, and summed up with the weight of the
    head; tokens that speak against the question rank last. The question is the text behind the last image up to the last
    end-of-turn token; the whole rest of the prompt where there is none; the token before it where nothing follows.

    Weights are calibrated, not learnt: by how much worse a model gets without a head. Those of Qwen2.5-VL-7B are shipped
    and taken for it. Any other model gets the same weight for every head, unless `head_weights` says otherwise:
    `vlmprune calibrate` measures them on pictures of yours, without labels.

    The official default is `HAWK(keep=0.198, rounding="ceil")` for pictures of a fixed size, and 0.4, 0.2 or 0.1 for native
    resolution.

    Positions: as for every method at the input; M-RoPE ids stay those of the full prompt, as in the official code.

    Attributes:
        head_weights: one number >= 0 a head of the first layer, or a file that `vlmprune calibrate` wrote; None for the
            shipped ones, or uniform.
        normalization: of a head's logits over the tokens of an image: "l2", "softmax" or "minmax".
        rounding: "round" as everywhere (halves to even), "ceil" keeps `ceil(keep * N)` tokens, as the official code does.
        min_visual_tokens: tokens that stay of an image at least, as far as it has that many.

    Source: "HAWK: Head Importance-Aware Visual Token Pruning in Multimodal Models", CVPR 2026, arXiv 2604.07812. Paper and
    official code agree; the way to the weights is in neither, and `vlmprune calibrate` has its own. The official code ranks
    all images of a prompt together, here every image has its own budget; it computes in the model's dtype, here in fp32.
    """

    head_weights: Sequence[float] | str | PathLike[str] | None = None
    normalization: Normalization = "l2"
    rounding: Literal["round", "ceil"] = "round"
    min_visual_tokens: int = 1

    name: ClassVar[str] = "hawk"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, FIRST_LAYER})
    symbols: ClassVar[Mapping[str, str]] = {"keep_ratio": "keep=keep_ratio"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("normalization", self.normalization, ("l2", "softmax", "minmax"))
        check_choice("rounding", self.rounding, ("round", "ceil"))
        check_int("min_visual_tokens", self.min_visual_tokens, 1)
        if self.head_weights is not None:
            object.__setattr__(self, "head_weights", check_weights(self.head_weights))

    def budget(self, total: int) -> int:
        """Return how many of `total` visual tokens of one image are kept."""
        return hawk_count(self.keep, total, self.rounding, self.min_visual_tokens)

    def select(self, batch: VisualBatch) -> Selection:
        """Take the `budgets[i]` highest scores of each image."""
        layer = batch.first_layer
        assert layer is not None
        weights = shipped_weights(layer) if self.head_weights is None else self.head_weights
        assert isinstance(weights, tuple)
        check_head_count(weights, layer)
        per_head = torch.tensor(weights).to(batch.features.device, non_blocking=True)
        parts = [
            hawk_scores(layer.queries(question), layer.keys(features), per_head, layer.scale, self.normalization)
            for question, features in zip(batch.questions, batch.features.split(list(batch.counts)), strict=True)
        ]
        scores = torch.cat(parts)
        return Selection(segmented_topk(scores, batch.offsets, batch.budgets), batch.budgets, scores=scores)

    def feature_macs(self, scored: Scored) -> int:
        """The question's queries, the tokens' keys, and one product a head and token; all text of the prompt counts."""
        first = scored.first_layer
        before = [total for total, kept in scored.images if kept < total]
        queries = len(before) * first.text_tokens * first.query_width * scored.dim
        return queries + sum(before) * (first.key_width * scored.dim + first.query_width)


def hawk_scores(
    queries: Tensor, keys: Tensor, weights: Tensor, scale: float, normalization: Normalization = "l2"
) -> Tensor:
    """Return the score of every visual token of one image, fp32 `[tokens]`.

    Args:
        queries: `[question, heads, head_dim]`, without rotation.
        keys: `[tokens, kv_heads, head_dim]`, without rotation.
        weights: fp32 `[heads]`.
        scale: factor of the logits.
        normalization: over the tokens of an image: "l2", "softmax" or "minmax".
    """
    mean = queries.float().mean(0)
    logits = row_attention(mean[None, None], keys[None], scale=scale, logits=True)[0, 0]
    logits = logits.nan_to_num(0.0, 0.0, 0.0)
    if normalization == "l2":
        logits = normalize(logits, dim=-1)
    elif normalization == "softmax":
        logits = logits.softmax(-1)
    else:
        low, high = logits.aminmax(dim=-1, keepdim=True)
        logits = (logits - low) / (high - low).clamp(min=torch.finfo(torch.float32).eps)
    return weights @ logits


def hawk_count(keep: float | int, total: int, rounding: str = "round", at_least: int = 1) -> int:
    """Return how many of `total` tokens stay.

    "ceil" is the official `ceil(total * keep)`, the product with its rounding error: 300 * 0.07 keeps 22.
    """
    official = rounding == "ceil" and isinstance(keep, float)
    count = ceil(total * keep) if official else token_budget(keep, total)
    return min(total, max(at_least, count))
