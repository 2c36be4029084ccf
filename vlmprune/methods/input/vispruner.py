"""VisPruner: the tokens of the highest attention, and the least repeated of the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import normalize

from vlmprune.methods.batch import Selection, TowerFacts, VisionSignal, VisualBatch
from vlmprune.methods.checks import check_number
from vlmprune.methods.needs import TOWER_ATTENTION, TOWER_FEATURES, Need
from vlmprune.methods.picture_method import PictureMethod
from vlmprune.methods.selection_macs import Scored, pairs_in_tiles_macs
from vlmprune.methods.shared.features import features_signal, tower_features
from vlmprune.methods.shared.tile_segments import even_counts, local_indices, tile_segments, to_device

# Tokens that a round removes from a tile of up to 576.
STEP, STEP_TOKENS = 8, 576


@dataclass(frozen=True, kw_only=True)
class VisPruner(PictureMethod):
    """Keep the tokens that the CLS token attends to most, and of the others those that are left when duplicates are taken out.

    Of `T` tokens that a tile keeps, `int(T * rho)` are the highest by the CLS attention of the layer whose output
    becomes the visual tokens (mean over heads). The others stand in a list, the highest first. In every round the
    list is split in even and odd places; the tokens at even places whose highest cosine to one at an odd place is
    highest are removed, 8 a round; the list goes on with the even places in falling order of that cosine, then the
    odd ones as they stood. Cosines are of the features before the projector. Without a CLS token, scores are the
    attention received in the tower's last layer. Every tile keeps the same number of tokens, as far as it has that
    many; newlines are dropped first. Kept tokens stay in raster order.

    Two scores that change places change the even and odd places behind them, so the choice below the important tokens can turn on
    rounding: relative noise of 1e-6 on the signals changed up to a sixth of it on a small model.

    Videos are served too, every frame as an image with an even share of the budget.

    Source: "Beyond Text-Visual Attention: Exploiting Visual Cues for Effective Token Pruning in VLMs", ICCV 2025,
    arXiv 2412.01818v2. The split by places and the 8 are the official code's; the paper says neither. The official
    code stops with an error where the list has an odd length; here the even places are then one more, and a round
    removes what there is. In tiles of more than 576 tokens a round removes 8 of every 576, so that the number of
    rounds stays that of the official tile. On LLaVA-NeXT the official code also selects among padding tokens, which
    transformers' models do not have.

    Attributes:
        rho: share of the tokens that attention chooses, 0 to 1 (`important_ratio` in the official code).
    """

    rho: float = 0.5

    name: ClassVar[str] = "vispruner"
    needs: ClassVar[frozenset[Need]] = frozenset({TOWER_ATTENTION, TOWER_FEATURES})
    symbols: ClassVar[Mapping[str, str]] = {"T": "keep=T * tiles, per image", "important_ratio": "rho="}

    def __post_init__(self) -> None:
        super().__post_init__()
        check_number("rho", self.rho, "[0, 1]")

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Ask for the attention of the feature layer (of the last layer without CLS token) and for the features."""
        return (tower.attention(tower.feature_layer if tower.has_cls else tower.layers - 1), features_signal(tower))

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` tokens of each image."""
        segments = tile_segments(batch.layouts)
        counts = even_counts(segments, batch.budgets)
        order = to_device(segments.order, batch.features.device)
        scores = batch.vision[self.vision_signals(batch.tower)[0]].float().mean(-1)[order]
        features = tower_features(batch)[order]
        # Tiles of one size that keep the same number go through the rounds together.
        alike: dict[tuple[int, int], list[int]] = {}
        for segment, ((begin, end), count) in enumerate(
            zip(pairwise(segments.offsets), counts.flatten().tolist(), strict=True)
        ):
            if count:
                alike.setdefault((end - begin, count), []).append(segment)
        kept = []
        for (size, count), members in alike.items():
            places = torch.tensor([segments.offsets[member] for member in members])[:, None] + torch.arange(size)
            places = to_device(places, order.device)
            chosen = vispruner_order(features[places], scores[places], int(count * self.rho), count)
            kept.append(order[places.gather(1, chosen)].flatten())
        return Selection(local_indices(torch.cat(kept).sort().values, segments, batch.budgets), batch.budgets)

    def feature_macs(self, scored: Scored) -> int:
        """The cosines of all pairs of a tile."""
        return pairs_in_tiles_macs(scored)


def vispruner_order(features: Tensor, scores: Tensor, important: int, count: int) -> Tensor:
    """Return the chosen tokens of every tile, int64 `[tiles, count]`: important ones by falling score, then the rest of the list.

    Args:
        features: `[tiles, tokens, dim]` before the projector.
        scores: `[tiles, tokens]`.
        important: tokens chosen by score.
        count: tokens chosen in all.
    """
    tiles, tokens = scores.shape
    step = max(STEP, round(STEP * tokens / STEP_TOKENS))
    ranked = scores.float().argsort(dim=1, descending=True, stable=True)
    if count == tokens or important == count:
        return ranked[:, :count]
    rest, left = ranked[:, important:], count - important
    unit = normalize(features.float(), dim=-1)
    cosines = (unit @ unit.transpose(1, 2)).flatten(0, 1)
    first = torch.arange(tiles, device=rest.device)[:, None] * tokens
    while rest.shape[1] > left:
        # Highest index first, so that of equally repeated tokens the lowest index survives.
        even, odd = rest[:, ::2].sort(dim=1, descending=True).values, rest[:, 1::2]
        rows = cosines.index_select(0, (even + first).flatten()).view(tiles, -1, tokens)
        # Adding to whole rows is much cheaper than gathering the columns of the odd places.
        hidden = torch.full_like(scores, -torch.inf, dtype=torch.float32).scatter_(1, odd, 0.0)
        nearest = rows.add_(hidden[:, None]).amax(2)
        falling = even.gather(1, nearest.argsort(dim=1, descending=True, stable=True))
        rest = torch.cat([falling[:, min(step, rest.shape[1] - left) :], odd], dim=1)
    return torch.cat([ranked[:, :important], rest], dim=1)
