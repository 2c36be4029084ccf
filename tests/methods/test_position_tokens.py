"""What `keep_positions` adds to a choice, where tokens are merged and stand out of order."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.methods.batch import Selection
from vlmprune.methods.layer_batch import LayerBatch
from vlmprune.methods.shared.position_tokens import position_count, with_position_tokens

WIDTH = 30


def batch_of(counts, budgets):
    hidden = torch.arange(2 * WIDTH, dtype=torch.float32)[:, None].expand(-1, 4).reshape(2, WIDTH, 4).clone()
    columns = tuple(torch.arange(count) + 3 for count in counts)
    return LayerBatch(
        layer=1, counts=counts, budgets=budgets, rows=tuple(range(len(counts))), columns=columns, hidden=hidden
    )


def appending(batch):
    """Keep the first tokens, and merge the others into the last but one, which is appended out of order."""
    kept, groups, features = [], [], []
    for image, (count, budget) in enumerate(zip(batch.counts, batch.budgets, strict=True)):
        dominant = torch.arange(count - budget + 1, count)
        own = torch.cat([dominant, torch.tensor([1])])
        place = torch.full((count,), budget - 1)
        place[0] = -1
        place[dominant] = torch.arange(budget - 1)
        kept.append(own)
        groups.append(place)
        values = batch.hidden[batch.rows[image], batch.columns[image]]
        features.append(values[own] + 100)
    return Selection(
        torch.cat(kept),
        tuple(batch.budgets),
        torch.cat(features),
        merge=lambda deep: deep[torch.cat([own + begin for own, begin in zip(kept, batch.offsets, strict=False)])] * 10,
        groups=torch.cat(groups),
    )


def test_merged_tokens_keep_their_order_and_added_ones_their_values():
    batch = batch_of((10, 8), (5, 5))
    ranks = tuple(-torch.arange(count).float() for count in batch.counts)
    selection = with_position_tokens(appending, batch, batch.budgets, ranks)
    # Two of five by position: 0 and 2, as 1 is the name of the merged one; it stays behind the tokens chosen before it.
    assert selection.kept.tolist() == [0, 2, 8, 9, 1, 0, 2, 6, 7, 1]
    assert selection.counts == (5, 5)
    begins = torch.tensor([3] * 5 + [WIDTH + 3] * 5)
    own = torch.tensor([False, False, True, True, True] * 2)
    assert selection.features[:, 0].tolist() == (selection.kept + begins + 100 * own).tolist()
    # Each token's group is the place of what it went into.
    assert selection.groups.tolist() == [0, 4, 1, 4, 4, 4, 4, 4, 2, 3, 0, 4, 1, 4, 4, 4, 2, 3]
    deep = torch.arange(18.0)[:, None]
    assert selection.merge(deep)[:, 0].tolist() == [0, 2, 80, 90, 10, 10, 12, 160, 170, 110]


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_budget_is_met_and_the_highest_ranks_stay(data):
    counts = tuple(data.draw(st.lists(st.integers(1, WIDTH - 3), min_size=1, max_size=2)))
    budgets = tuple(data.draw(st.integers(0, count)) for count in counts)
    scores = [torch.rand(count, generator=torch.Generator().manual_seed(count)) for count in counts]
    ranks = tuple(torch.rand(count, generator=torch.Generator().manual_seed(100 + count)) for count in counts)

    def best(batch):
        picks = [own.argsort(descending=True)[:n].sort().values for own, n in zip(scores, batch.budgets, strict=True)]
        return Selection(torch.cat(picks), batch.budgets)

    selection = with_position_tokens(best, batch_of(counts, budgets), budgets, ranks)
    assert selection.counts == budgets
    for image, kept in enumerate(selection.kept.split(list(budgets))):
        assert kept.tolist() == sorted(set(kept.tolist()))
        sure = ranks[image].argsort(descending=True)[: position_count(budgets[image])]
        assert set(sure.tolist()) <= set(kept.tolist())
        alone = scores[image].argsort(descending=True)[: budgets[image] - len(sure)]
        assert set(alone.tolist()) <= set(kept.tolist())


def test_a_method_that_decides_keeps_as_many_tokens():
    batch = batch_of((10,), (None,))

    def decides(batch):
        count = 6 if batch.budgets[0] is None else batch.budgets[0]
        return Selection(torch.arange(10 - count, 10), (count,))

    selection = with_position_tokens(decides, batch, batch.budgets, (-torch.arange(10).float(),))
    assert selection.kept.tolist() == [0, 1, 6, 7, 8, 9]


@pytest.mark.parametrize(("kept", "count"), [(0, 0), (1, 0), (2, 0), (3, 2), (10, 4), (288, 116), (576, 230)])
def test_share(kept, count):
    assert position_count(kept) == count
