"""`keep_positions=True`: part of a method's budget goes to the tokens that carry position."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import accumulate
from typing import Any, TypeVar

import torch
from torch import Tensor

from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.layer_batch import LayerBatch
from vlmprune.methods.shared.rotary_coordinates import coordinate_ranks

# IVC-Prune takes a fifth of what stays by the largest mean cosine, and a fifth by the largest mean sine.
_SHARE = 0.2

BatchT = TypeVar("BatchT", VisualBatch, LayerBatch)


def position_count(kept: int) -> int:
    """Return how many of `kept` tokens are taken for their position: those of IVC-Prune's two rules, never all."""
    return max(0, min(2 * round(_SHARE * kept), kept - 1))


def with_position_tokens(
    select: Callable[[BatchT], Selection],
    batch: BatchT,
    budgets: Sequence[int | None],
    ranks: Sequence[Tensor],
    decide: Callable[[BatchT], Selection] | None = None,
) -> Selection:
    """Let a method choose a part of every image's budget, and fill the rest with the tokens that carry position.

    Of `budgets[i]` tokens `position_count(budgets[i])` are left to position: the method chooses the others as if that were
    its budget, and the highest of `ranks[i]` that it has not chosen follow. So the budget is met exactly, and the tokens
    of the highest ranks are always among those that stay. They keep their own values; what a method merges others into
    keeps its place. Where the method decides from its scores how many tokens stay (None), it is asked first how many that
    are, and then for that budget.

    Args:
        select: the method with given budgets.
        batch: what it is shown.
        budgets: tokens that stay per image, or None.
        ranks: per image `[counts[i]]`, `coordinate_ranks` of its tokens.
        decide: the method where it decides how many stay, if that is not `select`.
    """
    if None in budgets:
        free = (decide or select)(batch).counts
        budgets = [count if budget is None else budget for budget, count in zip(budgets, free, strict=True)]
    totals: list[int] = [budget or 0 for budget in budgets]
    given: Any = replace(batch, budgets=tuple(total - position_count(total) for total in totals))
    chosen: Selection = select(given)
    starts = (0, *accumulate(chosen.counts))
    kept, source, added, extra = [], [], [], 0
    own_rows = len(chosen.kept)
    for image, own in enumerate(chosen.kept.split(list(chosen.counts))):
        # Merged tokens may stand behind later ones: what is added goes between without changing their order.
        missing = max(0, totals[image] - len(own))
        others = ranks[image].index_fill(0, own, -torch.inf)
        fill = others.argsort(descending=True, stable=True)[:missing].sort().values
        order = torch.cat([own.cummax(0).values if len(own) else own, fill]).argsort(stable=True)
        rows = torch.arange(len(own) + missing, device=own.device)
        rows = torch.where(rows < len(own), rows + starts[image], rows - len(own) + own_rows + extra)
        kept.append(torch.cat([own, fill])[order])
        source.append(rows[order])
        added.append(fill + batch.offsets[image])
        extra += missing
    return _extended(chosen, batch, torch.cat(kept), tuple(map(len, kept)), torch.cat(source), torch.cat(added))


def choose_input(method: InputMethod, batch: VisualBatch) -> Selection:
    """Return what a method chooses before the first layer, with the tokens that carry position if it asks for them."""
    if not method.keep_positions:
        return method.select(batch)
    assert batch.coordinates is not None
    ranks = [coordinate_ranks(*own.unbind(-1)) for own in batch.coordinates.split(list(batch.counts))]
    budgeted = method.with_budgets()
    budgets = batch.budgets if budgeted is method else (None,) * len(batch.counts)
    return with_position_tokens(budgeted.select, batch, budgets, ranks, method.select)


def _extended(
    chosen: Selection,
    batch: VisualBatch | LayerBatch,
    kept: Tensor,
    counts: tuple[int, ...],
    source: Tensor,
    added: Tensor,
) -> Selection:
    """Return `chosen` with the tokens `added`.

    Args:
        chosen: what the method chose.
        batch: what it was shown.
        kept: the indices of all tokens, image after image.
        counts: their number per image.
        source: for each of them its row in the table of the chosen ones followed by the added ones.
        added: the added tokens, as indices into the batch's packed tokens.
    """
    own = len(chosen.kept)
    features = groups = carried = None
    if chosen.features is not None:
        features = torch.cat([chosen.features, _values(batch, added).to(chosen.features)])[source]
    if chosen.carried is not None:
        carried = torch.cat([chosen.carried, chosen.carried.new_zeros(len(added), chosen.carried.shape[1])])[source]
    if chosen.groups is not None:
        place = torch.empty_like(source)
        for begin, count in zip((0, *accumulate(counts)), counts, strict=False):
            place[source[begin : begin + count]] = torch.arange(count, device=source.device)
        firsts = torch.repeat_interleave(
            torch.tensor((0, *accumulate(chosen.counts))[:-1]), torch.tensor(batch.counts)
        ).to(source.device)
        groups = torch.where(chosen.groups < 0, -1, place[(chosen.groups + firsts).clamp(min=0, max=max(0, own - 1))])
        groups[added] = place[own:]
    merge = None if chosen.merge is None else partial(_merged, chosen.merge, source=source, added=added)
    return replace(chosen, kept=kept, counts=counts, features=features, merge=merge, groups=groups, carried=carried)


def _values(batch: Any, tokens: Tensor) -> Tensor:
    """Return the values of packed tokens as they are now, `[tokens, dim]`."""
    if isinstance(batch, VisualBatch):
        return batch.features[tokens]
    pairs = zip(batch.rows, batch.columns, strict=True)
    table: Tensor = torch.cat([batch.hidden[row, columns] for row, columns in pairs])
    return table[tokens]


def _merged(merge: Callable[[Tensor], Tensor], deep: Tensor, *, source: Tensor, added: Tensor) -> Tensor:
    """Return merged DeepStack features of all tokens that stay, those of the added ones their own."""
    values = merge(deep)
    return torch.cat([values, deep[added.to(deep.device)].to(values)])[source.to(deep.device)]
