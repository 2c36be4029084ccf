"""Deep visual features (DeepStack) of a prompt that is cut between layers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .run import LayerRun


def hold_back_deepstack(run: LayerRun, arguments: dict[str, Any]) -> dict[str, Any]:
    """Take away the deep visual features that the host would add by its own columns after the first cut; `run` keeps them."""
    features = arguments.get("deepstack_visual_embeds")
    if features is None or run.images is None:
        return arguments
    first = min((layer for cuts in run.images.schedule for layer in cuts), default=len(features))
    run.deepstack = {layer: feature for layer, feature in enumerate(features) if layer >= first}
    return {**arguments, "deepstack_visual_embeds": list(features)[:first]} if run.deepstack else arguments


def add_deepstack(run: LayerRun, hidden: Tensor, layer: int) -> Tensor:
    """Add to the output `hidden [batch, width, dim]` of `layer` what was held back for it, at the visual tokens still alive."""
    features = run.deepstack.get(layer)
    if features is None:
        return hidden
    columns = torch.cat(run.cut_images.columns)
    source = torch.searchsorted(run.entry_columns, columns)
    added = hidden.flatten(0, 1).index_add(0, run.current(columns), features[source].to(hidden))
    return added.view_as(hidden)
