"""CATP: for prompts of several pictures with their texts, in three stages before and inside the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from math import floor
from typing import ClassVar

import torch
from torch import Tensor

from vlmprune.budget import Keep, check_keep
from vlmprune.errors import ParameterError
from vlmprune.kernels.coverage_from_values import coverage_from_values
from vlmprune.methods.base import Method
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.checks import check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.layer.catp_stages import CATPStages
from vlmprune.methods.needs import INSTRUCTION, STILL_IMAGES, Need
from vlmprune.methods.selection_macs import Scored, all_pairs_macs
from vlmprune.methods.shared.patches import patch_budgets, patches_of, select_patches
from vlmprune.methods.shared.tile_segments import to_device

# The average over layers falls by this share of what is removed in all: half of it before the first layer, half after
# layer 6 (demonstrations) or 7 (query) of 32.
_FALL = 0.5 + 0.5 * (1 - 7.5 / 32)

# How much of the images enters the language model, at most, as a multiple of the average over its layers.
_ENTERING = 1.75


@dataclass(frozen=True, kw_only=True)
class CATP(InputMethod):
    """Keep tokens that stand for their image and its text, then those that the query looks at, then those the context asks for.

    A prompt is a row of images, each with the text behind it: demonstrations, and at last the query. Before the language
    model each image keeps tokens greedily, each with the highest gain in `sum of the best similarity of every token to a
    kept one + lambda1 * sum of the kept ones' similarity to the text`; similarity is `(cosine + 1) / 2`, the text is the
    mean embedding of the words between the image and the next one (all text behind it where there is none). Newlines are
    dropped first. Inside the language model `CATPStages` drops tokens of all demonstrations together after layer `layer`,
    and of the query image one layer later. A row with one image has no demonstrations: only the first and the last
    stage act, and the last one takes the image's own text for the context.

    With `ratio`, the share R of visual tokens that is removed, both steps remove half of it: `floor(N * (1 - R / 2))`
    tokens of an image enter the language model, `floor((1 - R) * N)` leave it. `keep` (0.25 by default) is the average over
    layers; R is solved from it, and of images at most 1.75 times the average enter, which is less than `1 - R / 2` for a
    `keep` below 0.37 and leaves small budgets within reach. The published settings are `CATP(ratio=2/3)`, `ratio=7/9` and
    `ratio=0.899`, with `layer=6` (of 32 layers, and of the 28 of Qwen2.5-VL) or 10 (of 40).

    Positions: as with other input methods before the language model; inside it tokens stay where they were (the paper
    does not say).

    Attributes:
        keep: average over layers, a share or a number of tokens an image; None with `ratio`.
        ratio: the paper's R, in [0, 1).
        layer: the paper's K, 0-based layer after which demonstrations are cut; 6 of 32, scaled with the depth, if not given.
        lambda1: weight of the text beside the image.
        lambda2: weight of the similarity to the query beside the growth of attention.

    Source: "CATP: Contextually Adaptive Token Pruning for Efficient and Enhanced Multimodal In-Context Learning", AAAI 2026,
    arXiv 2508.07871. There is no official code. The paper leaves open: rounding (down, here), whether hidden states and
    attention are those of a layer's output (they are, here), and what is context for the query image (the demonstrations'
    remaining tokens and texts, without the system prompt).
    """

    keep: Keep | None = None  # type: ignore[assignment]
    ratio: float | None = None
    layer: int | None = None
    lambda1: float = 0.7
    lambda2: float = 0.6

    name: ClassVar[str] = "catp"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, INSTRUCTION})
    symbols: ClassVar[Mapping[str, str]] = {"R": "ratio=R", "K": "layer=K"}

    def __post_init__(self) -> None:
        if self.ratio is None:
            object.__setattr__(self, "keep", check_keep(0.25 if self.keep is None else self.keep))
        else:
            check_number("ratio", self.ratio, "[0, 1)", "the share of visual tokens that is removed")
            if self.keep is not None:
                raise ParameterError(
                    f"keep={self.keep!r} and ratio={self.ratio!r} both set the budget; give one of them. "
                    "keep is the average over layers, ratio is the share removed in all."
                )
        check_number("lambda1", self.lambda1, "[0, inf)")
        self.parts()

    def parts(self) -> tuple[Method, ...]:
        """Return this first stage, and the later ones unless nothing is to be dropped."""
        if self.keep == 1.0 or self.ratio == 0:
            return (self,)
        keep = self.keep
        if isinstance(keep, float):
            # Of the tokens that enter the language model.
            keep = keep / entering_share(keep)
        return (self, CATPStages(keep=keep, ratio=self.ratio, layer=self.layer, lambda2=self.lambda2))

    def budget(self, total: int) -> int:
        """Return how many of `total` visual tokens of one image enter the language model."""
        if not total:
            return 0
        if self.ratio is not None:
            return max(1, whole(total * (1 - self.ratio / 2)))
        share = self.keep / total if isinstance(self.keep, int) else self.keep
        assert share is not None
        return min(total, max(1, round(total * entering_share(min(1.0, share)))))

    def select(self, batch: VisualBatch) -> Selection:
        """Pick `budgets[i]` tokens of each image."""
        device, patches, counts = batch.features.device, patches_of(batch.layouts), patch_budgets(batch)
        features = batch.features[to_device(patches.indices, device)]
        picks = [
            catp_order(features[begin:end], instruction.following, count, self.lambda1)
            for (begin, end), count, instruction in zip(
                pairwise(patches.offsets), counts, batch.instructions, strict=True
            )
        ]
        return select_patches(torch.cat(picks), batch)

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of all pairs."""
        return all_pairs_macs(scored)


def entering_share(keep: float) -> float:
    """Return the share of an image that enters the language model for an average over layers of `keep`; rule in `CATP`."""
    removed = (1 - keep) / _FALL
    return min(1.0, max(keep, min(1 - removed / 2, _ENTERING * keep)))


def whole(count: float) -> int:
    """Round down what may be a whole number but for errors of the product."""
    return floor(count + 1e-9)


def catp_values(tokens: Tensor, text: Tensor) -> tuple[Tensor, Tensor]:
    """Return the similarities of tokens with each other, fp32 `[tokens, tokens]`, and with the text, fp32 `[tokens]`.

    Args:
        tokens: `[tokens, dim]`, the visual tokens of one image.
        text: `[words, dim]`, embeddings of its text.
    """
    rows = torch.nn.functional.normalize(tokens.to(torch.float32), dim=-1)
    mean = torch.nn.functional.normalize(text.to(torch.float32).mean(0), dim=-1)
    return (rows @ rows.T + 1) / 2, (rows @ mean + 1) / 2


def catp_order(tokens: Tensor, text: Tensor, count: int, lambda1: float) -> Tensor:
    """Return `count` of `tokens` in the order in which they are picked, int64; arguments as of `catp_values`."""
    if count == len(tokens):
        return torch.arange(count, device=tokens.device)
    values, to_text = catp_values(tokens, text)
    return coverage_from_values(values, count, weights=lambda1 * to_text, combine="add")
