"""A method before the first layer, behind a tower that handed on fewer tokens: it chooses among those."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from vlmprune.layout import unknown_layout
from vlmprune.methods.batch import ATTENTION_KINDS, Selection, VisualBatch
from vlmprune.methods.input_method import InputMethod

from .scored_items import Item, choose_among


def choose_among_merged(method: InputMethod, batch: VisualBatch, merged: Selection) -> Selection:
    """Return what a method keeps of the tokens that left the tower.

    It sees them without a grid, and the attention that all patches of a token got as that of the token.

    Args:
        method: what chooses.
        batch: all patches of all images; each has the feature of the token that it went into.
        merged: the tokens: whose place each takes, and where every patch went.

    Returns:
        What stays of the patches' places.
    """
    places = merged.kept.cpu().split(list(merged.counts))
    items = [
        Item(image, None, part, unknown_layout(len(part)), min(budget, len(part)))
        for image, (part, budget) in enumerate(zip(places, batch.budgets, strict=True))
    ]
    chosen = choose_among(method, _with_all_attention(batch, merged), items)
    return replace(chosen, groups=_composed(batch, merged, chosen))


def _with_all_attention(batch: VisualBatch, merged: Selection) -> VisualBatch:
    """The batch with the attention of all patches of a token at the place that the token takes; each had its share of it."""
    into, kept = _packed(batch, merged)
    vision = dict(batch.vision)
    for signal, values in batch.vision.items():
        if signal.kind in ATTENTION_KINDS and signal.kind != "cls_logits":
            there = into >= 0
            sums = values.new_zeros(len(kept), values.shape[1]).index_add_(0, into[there], values[there])
            vision[signal] = values.index_copy(0, kept, sums)
    return replace(batch, vision=vision)


def _packed(batch: VisualBatch, selection: Selection) -> tuple[Tensor, Tensor]:
    """The output of every patch among those of all images, -1 where it has none, and the patch whose place each output takes."""
    device = batch.features.device
    assert selection.groups is not None
    groups = selection.groups.to(device)
    counts, starts = torch.tensor(selection.counts), torch.tensor(batch.offsets[:-1])
    before = (counts.cumsum(0) - counts).repeat_interleave(torch.tensor(batch.counts)).to(device)
    kept = selection.kept.to(device) + starts.repeat_interleave(counts).to(device)
    return torch.where(groups < 0, -1, groups + before), kept


def _composed(batch: VisualBatch, merged: Selection, chosen: Selection) -> Tensor:
    """Which of the chosen tokens every patch went into, -1 where its token was dropped, int64 `[patches]`."""
    into, places = _packed(batch, merged)
    if chosen.groups is not None:
        own = chosen.groups.to(into.device)
    else:
        device = into.device
        own = torch.full((batch.offsets[-1],), -1, device=device)
        starts = torch.tensor(batch.offsets[:-1]).repeat_interleave(torch.tensor(chosen.counts)).to(device)
        numbers = torch.cat([torch.arange(count) for count in chosen.counts]).to(device)
        own[chosen.kept.to(device) + starts] = numbers
    return torch.where(into < 0, -1, own[places[into.clamp(min=0)]])
