"""ZOO-Prune: sensitive tokens that differ from each other."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.kernels.max_min import max_min
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_int, check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import PROJECTOR_LAYERS, STILL_IMAGES, TOWER_FEATURES, Need
from vlmprune.methods.selection_macs import Scored, all_pairs_macs
from vlmprune.methods.shared.features import features_signal
from vlmprune.methods.shared.patches import patch_budgets, patches_of, select_patches
from vlmprune.methods.shared.tile_segments import to_device

from .zooprune_sensitivity import sensitivity


@dataclass(frozen=True, kw_only=True)
class ZOOPrune(InputMethod):
    """Keep tokens greedily, each with the highest sensitivity times distance to those kept before.

    Sensitivity is how much the projector's output changes with its input: the mean over `m` random unit directions of
    the length of `(M(x + h u) - M(x - h u)) / 2h`, scaled to 0..1 over the image. The distance is 1 minus the highest
    cosine of the visual token to a kept one. First pick: the most sensitive token. Newlines are dropped first; kept
    tokens stay in position order; ties go to the lowest index.

    Source: "ZOO-Prune: Training-Free Token Pruning via Zeroth-Order Gradient Estimation in Vision-Language Models",
    CVPR 2026, arXiv 2509.24837. There is no official code. The paper's sensitivity is `ZOOPrune(h=0.01,
    sketch=None)`, which on LLaVA-1.5-7B costs as much as a pruned prefill: by default the limit of small steps is
    taken (`h=0`, exact in fp32, where 0.01 drowns in the rounding of half precision), and lengths are estimated from
    `sketch` random projections of the output, the same for all tokens; `sketches` sets of them take turns along the
    directions. By default that changes the order of tokens less than other directions would (rank correlations with
    the whole output: 0.988 and 0.976 on `tiny-llava`, 0.964 and 0.961 with random weights). Ours where the paper says
    nothing: one total for all tiles of an image, newlines, order, seeds; in Qwen's merger every patch of a token is
    moved along the same direction, before the norm; where the host interpolates visual tokens, sensitivity is taken at
    the interpolated features.

    Attributes:
        m: number of random directions.
        h: step of the differences; 0 for their limit.
        sketch: random projections that the length along a direction is estimated from; None for the whole output.
        sketches: sets of them.
        seed: seed of directions and projections.
    """

    m: int = 64
    h: float = 0.0
    sketch: int | None = 8
    sketches: int = 8
    seed: int = 0

    name: ClassVar[str] = "zooprune"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_FEATURES, PROJECTOR_LAYERS})

    def __post_init__(self) -> None:
        super().__post_init__()
        check_int("m", self.m, low=1)
        check_number("h", self.h, "[0, inf)")
        if self.sketch is not None:
            check_int("sketch", self.sketch, low=1)
        check_int("sketches", self.sketches, low=1)
        check_int("seed", self.seed, low=0)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the features."""
        return (features_signal(tower),)

    def select(self, batch: VisualBatch) -> Selection:
        """Pick `budgets[i]` tokens of each image."""
        assert batch.projector_layers is not None
        projector = batch.projector_layers()
        features = batch.vision[features_signal(batch.tower)]
        dim = features.shape[1] // projector.patches
        directions = random_directions(self.m, dim, self.seed)
        sketch = None
        if self.sketch is not None:
            sets = min(self.sketches, self.m)
            sketch = random_sketches(sets, self.sketch, projector.second.shape[0], self.seed)
        device = projector.first.device
        indices = to_device(patches_of(batch.layouts).indices, features.device)
        scores = sensitivity(
            features[indices].to(device),
            projector,
            to_device(directions, device),
            self.h,
            None if sketch is None else to_device(sketch, device),
        )
        scores = scores.to(features.device)
        return select_patches(zooprune_order(batch, scores), batch, scores)

    def feature_macs(self, scored: Scored) -> int:
        """The first layer on tokens and directions, the second or the projections on their changes, and all cosines."""
        rows = scored.dim if self.sketch is None else self.sketch
        second = 0
        if self.sketch is not None:
            second = min(self.sketches, self.m) * rows * scored.dim * scored.projector_hidden
        total = all_pairs_macs(scored)
        for tokens, kept in scored.images:
            if kept < tokens:
                first = (tokens + self.m) * (scored.projector - scored.projector_hidden * scored.dim)
                total += first + tokens * self.m * scored.projector_hidden * rows
        return total + second


def zooprune_order(batch: VisualBatch, scores: Tensor) -> Tensor:
    """Return the picks of every image in the order in which they are made: int64 indices among its patches.

    Args:
        batch: the images.
        scores: fp32 `[patches]`, sensitivity.
    """
    patches = patches_of(batch.layouts)
    image = torch.arange(len(patches.counts)).repeat_interleave(torch.tensor(patches.counts))
    image = to_device(image, scores.device)
    low, high = (
        scores.new_zeros(len(patches.counts)).scatter_reduce_(0, image, scores, reduce, include_self=False)
        for reduce in ("amin", "amax")
    )
    span = (high - low)[image]
    # Where all tokens are equally sensitive, distance alone counts.
    weights = torch.where(span > 0, (scores - low[image]) / span, 1.0)
    features = batch.features[to_device(patches.indices, batch.features.device)]
    return max_min(features, patches.offsets, patch_budgets(batch), weights=weights)


@lru_cache(maxsize=16)
def random_directions(m: int, dim: int, seed: int) -> Tensor:
    """Return `m` unit directions `[m, dim]`."""
    generator = torch.Generator().manual_seed(seed)
    return normalize(torch.randn(m, dim, generator=generator), dim=-1)


@lru_cache(maxsize=16)
def random_sketches(sets: int, rows: int, out: int, seed: int) -> Tensor:
    """Return sets of random projections `[sets, rows, out]` that keep lengths on average."""
    generator = torch.Generator().manual_seed(seed + 1)
    return torch.randn(sets, rows, out, generator=generator) / rows**0.5
