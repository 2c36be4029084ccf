"""TextMonkey's token filter: the tokens that no later token resembles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.patches import patch_budgets, patches_of, select_patches
from vlmprune.methods.shared.tile_segments import to_device

# Rows of the matrix of cosines that are held at once.
BLOCK = 512


@dataclass(frozen=True, kw_only=True)
class TextMonkey(InputMethod):
    """Keep the tokens whose highest cosine to a later token is lowest: of tokens that resemble each other the last stays.

    The last token of an image has no later one and always stays. Newlines are dropped first; kept tokens stay in
    position order; ties go to the lowest index.

    Source: the parameter-free filter of "TextMonkey: An OCR-Free Large Multimodal Model for Understanding Document",
    arXiv 2403.04473, whose model is trained; `keep` is its r of T tokens (512 of 1024). The paper's Algorithm 1
    compares with all other tokens, the official code and this one with later tokens only. The official code filters
    the tokens of all windows together before the language model, and adds those of the global picture unfiltered;
    here all patches of an image, thumbnail first, are one sequence. The trained resampler that the kept tokens ask
    the others through is no part of the filter.
    """

    name: ClassVar[str] = "textmonkey"
    needs: ClassVar[frozenset[Need]] = frozenset()
    symbols: ClassVar[Mapping[str, str]] = {"r": "keep as an int, the number kept per image"}

    def select(self, batch: VisualBatch) -> Selection:
        """Take the lowest scores, `budgets[i]` of each image."""
        patches = patches_of(batch.layouts)
        features = batch.features[to_device(patches.indices, batch.features.device)]
        scores = textmonkey_score(features, patches.offsets)
        return select_patches(segmented_topk(-scores, patches.offsets, patch_budgets(batch)), batch, -scores)

    def feature_macs(self, scored: Scored) -> int:
        """Cosines of each token with those behind the beginning of its block, up to the last."""
        total = 0
        for tokens, kept in scored.images:
            if kept < tokens:
                blocks = [(first, min(BLOCK, tokens - first)) for first in range(0, tokens, BLOCK)]
                total += sum(rows * (tokens - first) for first, rows in blocks) * scored.dim
        return total


def textmonkey_score(features: Tensor, offsets: Sequence[int]) -> Tensor:
    """Return each token's highest cosine to a later token of its image, fp32 `[tokens]`.

    The last token of an image has -1, below which there is none. (The official code has its cosine to itself, minus 2.)

    Args:
        features: `[tokens, dim]`.
        offsets: `[images + 1]` bounds of the images in `features`.
    """
    scores = [features.new_empty(0, dtype=torch.float32)]
    for begin, end in pairwise(offsets):
        rows = normalize(features[begin:end].float(), dim=-1)
        for first in range(0, end - begin, BLOCK):
            cosines = rows[first : first + BLOCK] @ rows[first:].T
            later = torch.ones_like(cosines, dtype=torch.bool).triu(1)
            scores.append(cosines.masked_fill(~later, -torch.inf).amax(1))
        if end > begin:
            scores[-1][-1] = -1.0
    return torch.cat(scores)
