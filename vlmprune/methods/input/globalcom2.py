"""GlobalCom2: the thumbnail says how much of each crop to keep, and helps to say what."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import pad

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_choice, check_flag, check_number
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import STILL_IMAGES, TILES, TOWER_ATTENTION, Need
from vlmprune.methods.selection_macs import Scored, one_cosine_macs
from vlmprune.methods.shared.apportion import apportion
from vlmprune.methods.shared.tile_segments import (
    TileSegments,
    spread_newlines,
    tile_segments,
    to_device,
    top_of_segments,
)

from .globalcom2_order import official_order
from .globalcom2_scores import guide, holistic_scores, local_scores


@dataclass(frozen=True, kw_only=True)
class GlobalCom2(InputMethod):
    """Keep more of the crops that matter in the thumbnail, and score their tokens by their own and the thumbnail's attention.

    Scores are the CLS logits (before the softmax, mean over heads) of the last vision tower layer. The sums of the
    thumbnail's scores over the cells of the crops go through a softmax with a temperature; a crop keeps the share `R
    * (1 + sigma_j - mean(sigma))` of its tokens. Its tokens are ranked by the sum of their own scores and of the
    thumbnail's scores resized to the image, both L2-normalised over the crop. Newlines are kept. A tower without CLS
    token is scored by the negative cosine between a token and the mean of its tile, as in the paper's appendix.

    Source: "Compression with Global Guidance: Towards Training-free High-Resolution MLLMs Acceleration" (later
    "Global Compression Commander", AAAI 2026), arXiv 2501.05179. The paper writes the CLS attention with its softmax,
    and the score as `alpha * global + (1 - alpha) * local`; the official code takes the logits, whose sums alone make
    the crops' shares differ at a temperature of 10, and adds both views after normalising each: here as in the code.
    Scores are those of the last tower layer in both, one later than the features. The score without a CLS token is
    the paper's, the official code has none. By default the budget is spent exactly, newlines included (at most half
    of a very small budget goes to them), and kept tokens stay in raster order. The paper claims that total too; the
    official code truncates the share of every tile and lets the newlines come on top (`faithful=True`, which also
    leaves images that are not cut in tiles whole). It feeds the thumbnail in score order, places crop tokens by their
    rank among the tokens that are no padding, and adds a newline for every row of the padded image
    (`order="official"`). It serves one image a call.

    Attributes:
        keep: the paper's retention ratio R, or a number per image.
        temperature: of the softmax over the crops (tau).
        faithful: official counts instead of the exact budget.
        order: "position", or "official" (with `faithful`), which puts other tokens' values in the kept positions.
    """

    temperature: float = 10.0
    faithful: bool = False
    order: Literal["position", "official"] = "position"

    name: ClassVar[str] = "globalcom2"
    needs: ClassVar[frozenset[Need]] = frozenset({STILL_IMAGES, TOWER_ATTENTION, TILES})
    symbols: ClassVar[Mapping[str, str]] = {
        "R": "keep=R",
        "retention_ratio": "keep=retention_ratio",
        "tau": "temperature=",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("order", self.order, ("position", "official"))
        check_number("temperature", self.temperature, "(0, inf)")
        check_flag("faithful", self.faithful)
        if self.order == "official" and not self.faithful:
            raise ParameterError('order="official" goes with the official counts; set faithful=True.')

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the CLS logits of the last layer; nothing where there is no CLS token."""
        return (VisionSignal("cls_logits", tower.layers - 1),) if tower.has_cls else ()

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` tokens of each image, or the official number of them.

        Raises:
            BudgetError: the official order needs more newlines than there are tokens to take the place of.
        """
        segments = tile_segments(batch.layouts)
        scores = local_scores(batch, segments)
        guides = [
            guide(scores[start:end], layout, self.temperature)
            for start, end, layout in zip(batch.offsets, batch.offsets[1:], batch.layouts, strict=False)
        ]
        most_crops = segments.sizes.shape[1] - 2
        boost = torch.stack([pad(share, (0, most_crops - len(share))) for share, _ in guides])
        combined = holistic_scores(scores, torch.cat([view for _, view in guides]), segments)
        if self.faithful:
            k = self._official_counts(batch, segments, boost)
            totals = tuple(k.sum(-1).tolist())
        else:
            newlines = self._newlines(batch, segments)
            k, totals = self._counts(batch, segments, boost, newlines), batch.budgets
            combined = spread_newlines(combined, segments, newlines)
        selection = top_of_segments(combined, segments, k, totals)
        return selection if self.order == "position" else official_order(batch, selection, scores)

    def feature_macs(self, scored: Scored) -> int:
        """The cosine of each token with the mean of its tile, where there is no CLS token."""
        return 0 if scored.has_cls else one_cosine_macs(scored)

    def _newlines(self, batch: VisualBatch, segments: TileSegments) -> Tensor:
        budgets = torch.tensor(batch.budgets)
        return torch.maximum(budgets - segments.patches, torch.minimum(segments.sizes[:, -1], budgets // 2))

    def _counts(self, batch: VisualBatch, segments: TileSegments, boost: Tensor, newlines: Tensor) -> Tensor:
        left, device = torch.tensor(batch.budgets) - newlines, boost.device
        thumbnail = (segments.sizes[:, 0] * left.double() / segments.patches).round().to(torch.int64)
        sizes = to_device(segments.sizes[:, 1:-1], device)
        crops = apportion(to_device(left - thumbnail, device), sizes * (1 + boost), sizes)
        return torch.cat([to_device(thumbnail[:, None], device), crops, to_device(newlines[:, None], device)], dim=1)

    def _official_counts(self, batch: VisualBatch, segments: TileSegments, boost: Tensor) -> Tensor:
        counts, boost = segments.sizes.clone(), boost.cpu()
        for image, layout in enumerate(batch.layouts):
            if layout.crops is not None:
                rate = self.keep if isinstance(self.keep, float) else self.keep / batch.counts[image]
                counts[image, 0] = int(int(counts[image, 0]) * rate)
                counts[image, 1:-1] = (counts[image, 1:-1] * crop_shares(boost[image], rate)).to(torch.int64)
        return counts


def crop_shares(boost: Tensor, rate: float) -> Tensor:
    """Return the official share of each crop that is kept, fp64 `[crops]`, at most 1."""
    return (rate * (1 + boost)).clamp(max=1.0)
