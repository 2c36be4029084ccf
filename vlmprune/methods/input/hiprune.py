"""HiPrune: anchors of a middle layer with their neighbours, and registers of a deep one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_flag, check_int, check_number
from vlmprune.methods.needs import TOWER_ATTENTION, Need
from vlmprune.methods.picture_method import FrameOrVideoMethod
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.tile_segments import even_counts, tile_segments, to_device, top_of_segments


@dataclass(frozen=True, kw_only=True)
class HiPrune(FrameOrVideoMethod):
    """Keep the tokens that a middle tower layer attends to most, their neighbours, and the best of a deep layer.

    Scores are the attention that a token receives from all tokens of its tile (the CLS token's query included),
    averaged over heads. Of `T` tokens that a tile keeps, `round(T * alpha / 5)` are anchors, the highest in the
    middle layer; their left, right, upper and lower neighbours are the buffers; the others are registers, the highest
    in the layer whose output becomes the visual tokens. Every tile keeps the same number of tokens, as far as it has
    that many; newlines are dropped first. Kept tokens stay in raster order and have the positions that the family's
    default gives them (as in the official code: compacted ids in LLaVA, the original M-RoPE ids in Qwen).

    Videos are served too, every frame as an image with an even share of the budget, or all frames at once: `per="video"`.

    Source: "HiPrune: Hierarchical Attention for Efficient Token Pruning in VLMs", arXiv 2508.00553. As in the
    official code, neighbours are taken by index: those beside the border of a tile wrap to the next row, those above
    and below it become the tile's first and last token; the paper leaves them out. Where the official code differs:
    it clamps to 24 x 24 tokens, here to the tokens that a tile has without its padding; it divides `keep` by all
    tiles of the call, here by those of the image; it fails where anchors and buffers exceed `T`, here there are at
    most `T // 5` anchors. Its Qwen code subtracts 1 from the scores of tokens that are in already, which does not
    exclude them where scores exceed 1, so that fewer tokens than asked for are kept; `faithful=True` does that too.

    Attributes:
        alpha: share of the anchors and buffers.
        object_layer: the middle layer, counted from 1 as in the paper (l); 9 of 24 for towers with a CLS token and 16
            of 32 for others, in proportion to the layers where there are more or fewer, if not given.
        faithful: on towers without CLS token, count tokens that are chosen twice once, as the official Qwen code
            does.
    """

    alpha: float = 0.1
    object_layer: int | None = None
    faithful: bool = False

    name: ClassVar[str] = "hiprune"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_ATTENTION})
    symbols: ClassVar[Mapping[str, str]] = {"l": "object_layer="}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "[0, 1]")
        if self.object_layer is not None:
            check_int("object_layer", self.object_layer, low=1)
        check_flag("faithful", self.faithful)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention received in the object layer and in the feature layer.

        Raises:
            ParameterError: the tower has no such layer.
        """
        layer = self.object_layer
        if layer is None:
            layer = max(1, tower.layers * 3 // 8 if tower.has_cls else tower.layers // 2)
        if layer > tower.layers:
            raise ParameterError(
                f"object_layer={layer}, but the vision tower has {tower.layers} layers; allowed: 1 to {tower.layers}; "
                f"nearest: {tower.layers}."
            )
        return (VisionSignal("received_attention", layer - 1), VisionSignal("received_attention", tower.feature_layer))

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` tokens of each image."""
        _, deep = self.vision_signals(batch.tower)
        group = self.anchors(batch).group
        segments = tile_segments(batch.layouts)
        counts = even_counts(segments, batch.budgets)
        scores = batch.vision[deep].float().mean(-1)
        if self.faithful and not batch.tower.has_cls:
            return self._official_selection(batch, scores, group)
        return top_of_segments(scores.masked_fill(group, torch.inf), segments, counts, batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """Nothing beyond the attention."""
        return 0

    def anchors(self, batch: VisualBatch) -> Anchors:
        """Return the anchors of every tile, and which tokens are an anchor or the neighbour of one."""
        shallow, _ = self.vision_signals(batch.tower)
        scores = batch.vision[shallow].float().mean(-1)
        device, segments = scores.device, tile_segments(batch.layouts)
        tokens = even_counts(segments, batch.budgets)
        # Double, as Python's round on T * alpha / 5.
        number = torch.minimum((tokens.double() * self.alpha / 5).round().long(), tokens // 5)
        number[:, -1] = 0
        number = number.flatten()
        order = to_device(segments.order, device)
        chosen = segmented_topk(scores[order], segments.offsets, number, order="score")
        starts, sizes = torch.tensor(segments.offsets[:-1]), segments.sizes.flatten()
        columns = _columns(batch.layouts)
        start, last, width = (
            to_device(values.repeat_interleave(number), device) for values in (starts, sizes - 1, columns)
        )
        zero = torch.zeros_like(width)
        steps = torch.stack([zero, zero - 1, zero + 1, -width, width], dim=1)
        around = torch.minimum((chosen[:, None] + steps).clamp(min=0), last[:, None]) + start[:, None]
        group = torch.zeros_like(scores, dtype=torch.bool)
        return Anchors(chosen, tuple(number.tolist()), group.index_fill_(0, order[around.flatten()], True))

    def _official_selection(self, batch: VisualBatch, scores: Tensor, group: Tensor) -> Selection:
        segments, device = tile_segments(batch.layouts), scores.device
        counts = even_counts(segments, batch.budgets)
        # Attention summed over the queries, of which there is one a patch.
        queries = torch.tensor([layout.total // layout.frames for layout in batch.layouts])
        tokens = to_device(queries.repeat_interleave(torch.tensor(batch.counts)), device)
        summed = scores * tokens * batch.tower.patches_per_token
        order = to_device(segments.order, device)
        sizes = to_device(segments.sizes, device).flatten()
        in_group = torch.zeros_like(sizes).index_add_(0, to_device(segments.segment, device), group.long())
        registers = (counts.flatten() - in_group.cpu()).clamp(min=0)
        chosen = segmented_topk((summed - group.float())[order], segments.offsets, registers)
        starts = torch.tensor(segments.offsets[:-1]).repeat_interleave(registers)
        kept = group.index_fill(0, order[chosen + to_device(starts, device)], True).split(list(batch.counts))
        indices = [image.nonzero().flatten() for image in kept]
        return Selection(torch.cat(indices), tuple(len(image) for image in indices))


class Anchors(NamedTuple):
    """What the middle layer chooses.

    Attributes:
        indices: int64 `[sum(counts)]`, anchors of every tile, the highest first, counted inside the tile.
        counts: anchors per segment of `tile_segments`.
        group: bool `[tokens]`, anchors and their neighbours.
    """

    indices: Tensor
    counts: tuple[int, ...]
    group: Tensor


@lru_cache(maxsize=64)
def _columns(layouts: tuple[VisualLayout, ...]) -> Tensor:
    """Return the number of columns of every segment of `tile_segments`, int64; 1 where the geometry is unknown."""
    segments = tile_segments(layouts)
    stitched = torch.cat([layout.stitched_column for layout in layouts])
    column = torch.where(stitched >= 0, stitched, torch.cat([layout.column for layout in layouts]))
    pairs = torch.stack([segments.segment, column], dim=1).unique(dim=0)
    return torch.bincount(pairs[:, 0], minlength=segments.sizes.numel())
