"""Deep visual features (DeepStack, arXiv 2406.04334), which the host adds to the visual tokens after its first layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection

from .compaction import Compaction
from .image_spans import ImageSpans, columns_of


def compact_deepstack(
    kwargs: dict[str, Any],
    compaction: Compaction,
    kept_columns: Tensor,
    merged: Callable[[Tensor], Tensor] | None = None,
) -> dict[str, Any]:
    """Return the language model's arguments with the deep features of the kept visual tokens only, where there are any.

    Args:
        kwargs: arguments of the call; `visual_pos_masks [batch, columns]` and `deepstack_visual_embeds`, per layer
            `[visual tokens, dim]` row by row, are replaced.
        compaction: how the rows shrink.
        kept_columns: int64 `[kept]`, `row * columns + column` of every kept visual token, in any order.
        merged: for methods that merge tokens: turns the features of all visual tokens, row by row, into those of the tokens
            of `kept_columns`, `[kept, dim]`. Without it a kept token has the deep features of its own place.
    """
    mask, features = kwargs.get("visual_pos_masks"), kwargs.get("deepstack_visual_embeds")
    if mask is None or features is None:
        return kwargs
    order = kept_columns.argsort()
    rank = mask.flatten().to(kept_columns.device).cumsum(0) - 1
    source = rank[kept_columns[order]]

    def chosen(feature: Tensor) -> Tensor:
        if merged is not None:
            return merged(feature)[order.to(feature.device)]
        return feature[source.to(feature.device)]

    index = compaction.index.to(mask.device)
    return {
        **kwargs,
        "visual_pos_masks": mask.gather(1, index.clamp(min=0)) & (index >= 0),
        "deepstack_visual_embeds": [chosen(feature) for feature in features],
    }


def merging_of(selection: Selection, spans: ImageSpans) -> Callable[[Tensor], Tensor] | None:
    """Return what merges the deep features as `selection` merged the visual tokens, or None if it says nothing of it.

    The result takes `[visual tokens, dim]`, row by row, and gives the merged ones of every image in prompt order.
    """
    if selection.merge is None:
        return None
    merge = selection.merge
    encoded = torch.searchsorted(spans.flat.sort().values, columns_of(spans.first_of, spans))

    def merged(features: Tensor) -> Tensor:
        parts = merge(features[encoded.to(features.device, non_blocking=True)]).split(list(selection.counts))
        return torch.cat([parts[image] for image in spans.unique])

    return merged
