"""Deep visual features (DeepStack, arXiv 2406.04334), which the host adds to the visual tokens after its first layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from .compaction import Compaction


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
