"""HiRED: a token budget per tile from the first layer, tokens from the last."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedMethodError
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_int, check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import STILL_IMAGES, TOWER_ATTENTION, WHOLE_TILES, Need
from vlmprune.methods.selection_macs import Scored
from vlmprune.methods.shared.apportion import apportion
from vlmprune.methods.shared.tile_segments import (
    TileSegments,
    newline_surplus,
    tile_segments,
    to_device,
    top_of_segments,
)


@dataclass(frozen=True, kw_only=True)
class HiRED(InputMethod):
    """Give the thumbnail a share `alpha` of the budget and each crop a share by its visual content, then take the best of each.

    Content is read off the thumbnail: the CLS attention of layer 0 inside the cell that the crop shows, as the number
    of its tokens among the highest ("count") or as attention mass ("mass"). Tokens of a tile are taken by the CLS
    attention of the layer whose output becomes the visual tokens. Heads are summed. Newlines are dropped; kept tokens
    stay in raster order.

    An image that is not cut in tiles is all thumbnail, as in the official code for LLaVA-1.5: the best of the whole budget.

    Source: "HiRED: Attention-Guided Token Dropping for Efficient Inference of High-Resolution Vision-Language
    Models", AAAI 2025, arXiv 2408.10945. By default the budget is spent exactly, on tokens that exist, and a cell is
    a rectangle of the thumbnail. The official code is `HiRED(faithful=True, cells="bands")`: it cuts the thumbnail in
    bands of consecutive tokens, truncates every budget and selects among padding too. Its budget counts padding as
    well, so that it keeps fewer tokens than asked for, or more; where more, the lowest scores go here, so that `keep`
    holds. (It also stitches crops of wide and tall images transposed, and so loses more; here crops lie
    where they belong.) Its paper is `HiRED(faithful=True, content="mass")`.

    Attributes:
        keep: the paper's token budget rate r, or a number per image.
        alpha: share of the thumbnail, 0 to 1.
        content: "count" as the official code, "mass" as the paper.
        content_topk: tokens of the thumbnail that "count" counts; `int(N * (1 - alpha))` of N if not given.
        cells: "grid" for rectangles, "bands" for runs of consecutive tokens.
        faithful: official counts instead of the exact budget.
    """

    alpha: float = 0.5
    content: Literal["count", "mass"] = "count"
    content_topk: int | None = None
    cells: Literal["grid", "bands"] = "grid"
    faithful: bool = False

    name: ClassVar[str] = "hired"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_ATTENTION, WHOLE_TILES})
    symbols: ClassVar[Mapping[str, str]] = {"r": "keep=r", "token_budget_rate": "keep=token_budget_rate"}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("alpha", self.alpha, "[0, 1]")
        check_choice("content", self.content, ("count", "mass"))
        check_choice("cells", self.cells, ("grid", "bands"))
        check_flag("faithful", self.faithful)
        if self.content_topk is not None:
            check_int("content_topk", self.content_topk, low=1)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the CLS attention of layer 0 and of the feature layer."""
        return (tower.attention(0), tower.attention(tower.feature_layer))

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` tokens of each image, or the official number of them.

        Raises:
            UnsupportedMethodError: `faithful` where the batch lacks the attention of whole tiles.
        """
        first, last = self.vision_signals(batch.tower)
        segments = tile_segments(batch.layouts)
        weights = self.content_scores(batch.vision[first].float().sum(-1), batch.layouts, segments)
        if self.faithful:
            return self._official_selection(batch, last, weights)
        newlines = newline_surplus(segments, batch.budgets)
        left = torch.tensor(batch.budgets) - newlines
        thumbnail_size, crop_sizes = segments.sizes[:, 0], segments.sizes[:, 1:-1]
        share = torch.tensor([int(budget * self.alpha) for budget in left.tolist()])
        thumbnail = torch.maximum(torch.minimum(share, thumbnail_size), left - crop_sizes.sum(-1))
        device = weights.device
        crops = apportion(to_device(left - thumbnail, device), weights, to_device(crop_sizes, device))
        k = torch.cat([to_device(thumbnail[:, None], device), crops, to_device(newlines[:, None], device)], dim=1)
        return top_of_segments(batch.vision[last].float().sum(-1), segments, k, batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """Nothing beyond the attention."""
        return 0

    def content_scores(self, scores: Tensor, layouts: tuple[VisualLayout, ...], segments: TileSegments) -> Tensor:
        """Return the visual content of every crop, fp32 `[images, most crops]`, from the layer-0 `scores [tokens]`."""
        images, width = segments.sizes.shape
        tokens, target = _thumbnail_cells(layouts, self.cells)
        values = scores[to_device(tokens, scores.device)]
        if self.content == "count":
            sizes = [int(size) for size in segments.sizes[:, 0]]
            topk = [min(size, self.content_topk or int(size * (1 - self.alpha))) for size in sizes]
            starts = [0, *torch.tensor(sizes).cumsum(0).tolist()]
            best = segmented_topk(values, starts, topk)
            best = best + to_device(torch.tensor(starts[:-1]).repeat_interleave(torch.tensor(topk)), best.device)
            values = torch.zeros_like(values).index_fill_(0, best, 1.0)
        content = scores.new_zeros(images * width).index_add_(0, to_device(target, scores.device), values)
        return content.view(images, width)[:, 1:-1]

    def tile_masks(self, final: Tensor, content: Tensor, total: int) -> tuple[Tensor, Tensor]:
        """Return the official counts `[tiles]` and kept tokens `[tiles, N]` of one image, padding included.

        Args:
            final: scores of the last layer, `[tiles, N]`, the thumbnail first.
            content: visual content `[crops]`.
            total: visual tokens that a `keep` given as a number counts on.
        """
        tiles, tokens = final.shape
        rate = self.keep if isinstance(self.keep, float) else self.keep / total
        budget = max(1, int(tiles * tokens * rate))
        thumbnail = min(int(budget * self.alpha) if tiles > 1 else budget, tokens)
        left = min(budget - thumbnail, (tiles - 1) * tokens)
        share = content.float() / content.float().sum().clamp(min=torch.finfo(torch.float32).tiny)
        crops = (share * left).to(torch.int64).clamp(max=tokens)
        counts = torch.cat([crops.new_tensor([thumbnail]), crops])
        kept = segmented_topk(final.flatten(), range(0, final.numel() + 1, tokens), counts)
        start = torch.arange(tiles, device=final.device).mul(tokens).repeat_interleave(counts)
        mask = torch.zeros(final.numel(), dtype=torch.bool, device=final.device)
        return counts, mask.index_fill_(0, kept + start, True).view_as(final)

    def _official_selection(self, batch: VisualBatch, last: VisionSignal, weights: Tensor) -> Selection:
        if last not in batch.tile_vision:
            raise UnsupportedMethodError(
                "HiRED(faithful=True) selects in whole tiles, padding included, whose attention this model's family does not "
                "give; allowed: faithful=False."
            )
        chosen = self.official_tokens(batch, last, weights)
        scores, kept = batch.vision[last].float().sum(-1).split(list(batch.counts)), []
        for tokens, values, budget in zip(chosen, scores, batch.budgets, strict=True):
            if len(tokens) > budget:
                tokens = tokens[segmented_topk(values[tokens], (0, len(tokens)), (budget,))]
            kept.append(tokens)
        return Selection(torch.cat(kept), tuple(len(tokens) for tokens in kept))

    def official_tokens(self, batch: VisualBatch, last: VisionSignal, weights: Tensor) -> list[Tensor]:
        """Return the tokens that the official code keeps of every image, whose number may exceed `keep`.

        Args:
            last: the signal that tokens are ranked by.
            weights: visual content `[images, most crops]`.
        """
        kept = []
        for layout, final, content in zip(batch.layouts, batch.tile_vision[last], weights, strict=True):
            _, mask = self.tile_masks(final.float().sum(-1), content[: len(final) - 1], layout.total)
            index = torch.arange(layout.total)
            if layout.tile_grid is not None:
                index = layout.tile * mask.shape[1] + layout.row * layout.tile_grid[1] + layout.column
            index = to_device(index.clamp(min=0), mask.device)
            chosen = mask.flatten()[index] & ~to_device(layout.newline, mask.device)
            kept.append(chosen.nonzero().flatten())
        return kept


@lru_cache(maxsize=64)
def _thumbnail_cells(layouts: tuple[VisualLayout, ...], cells: str) -> tuple[Tensor, Tensor]:
    """Return the packed indices of all thumbnail tokens, and the segment of the crop that shows each of them."""
    segments = tile_segments(layouts)
    width, start = segments.sizes.shape[1], 0
    tokens, target = [], []
    for image, layout in enumerate(layouts):
        inside = ((layout.tile == 0) & ~layout.newline).nonzero().flatten()
        tokens.append(inside + start)
        start += layout.total
        cell = torch.full_like(inside, -1)
        if layout.crops is not None and layout.tile_grid is not None:
            rows, columns = layout.crops
            if cells == "bands":
                cell = torch.arange(len(inside)) * (rows * columns) // len(inside)
            else:
                height, tile_width = layout.tile_grid
                row = layout.row[inside] * rows // height
                cell = row * columns + layout.column[inside] * columns // tile_width
        target.append(image * width + 1 + cell)
    return torch.cat(tokens), torch.cat(target)
