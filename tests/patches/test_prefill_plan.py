"""How rows shrink: the plan of a compaction, by hand on a prompt of eight columns."""

import torch

from vlmprune.patches.prefill.compaction import gather_columns, plan_compaction, restore_columns
from vlmprune.patches.prefill.position_gaps import dropped_positions

# t: text, v: visual, .: padding       t v v v t t . .      . t v v v v t t
KEEP = torch.tensor([[1, 0, 1, 0, 1, 1, 0, 0], [0, 1, 1, 1, 0, 1, 1, 1]]).bool()
VISUAL = torch.tensor([[0, 1, 1, 1, 0, 0, 0, 0], [0, 0, 1, 1, 1, 1, 0, 0]]).bool()
PLAN = plan_compaction(KEEP, VISUAL, lengths=(4, 6), removed=(2, 1))


def test_kept_columns_are_packed_to_the_right():
    assert PLAN.width == 6
    assert PLAN.ragged
    assert PLAN.index.tolist() == [[-1, -1, 0, 2, 4, 5], [1, 2, 3, 5, 6, 7]]


def test_every_column_knows_where_it_went_or_that_it_went():
    assert PLAN.destination.tolist() == [[2, 6, 3, 6, 4, 5, 6, 6], [6, 0, 1, 2, 6, 3, 4, 5]]


def test_dropped_visual_tokens_are_counted_up_to_every_column():
    assert PLAN.dropped_before.tolist() == [[0, 1, 1, 2, 2, 2, 2, 2], [0, 0, 0, 0, 1, 1, 1, 1]]


def test_what_was_gathered_is_restored_with_zeros_where_it_was_dropped():
    hidden = torch.arange(1.0, 17.0).view(2, 8, 1).expand(2, 8, 3)
    (compacted,) = gather_columns([hidden], PLAN.index)
    assert compacted[..., 0].tolist() == [[0, 0, 1, 3, 5, 6], [10, 11, 12, 14, 15, 16]]
    assert torch.equal(restore_columns(compacted, PLAN), hidden * KEEP[..., None])


def test_gaps_close_by_what_no_kept_token_uses_any_more():
    present = torch.ones(1, 6, dtype=torch.bool)
    positions = torch.tensor([[0, 1, 2, 3, 4, 5]])
    lower, removed = dropped_positions(positions, present, torch.tensor([[1, 0, 1, 0, 1, 1]]).bool())
    assert (positions - lower).tolist() == [[0, 0, 1, 1, 2, 3]]
    assert removed.tolist() == [[2]]


def test_an_id_of_three_axes_is_used_while_any_axis_has_it():
    # One image of 2 x 2 between two text tokens; dropping the lower right token frees no id, the whole lower row one.
    positions = torch.tensor([[[0, 1, 1, 1, 1, 3]], [[0, 1, 1, 2, 2, 3]], [[0, 1, 2, 1, 2, 3]]])
    present = torch.ones(1, 6, dtype=torch.bool)
    _, removed = dropped_positions(positions, present, torch.tensor([[1, 1, 1, 1, 0, 1]]).bool())
    assert removed.tolist() == [[0]]
    _, removed = dropped_positions(positions, present, torch.tensor([[1, 1, 0, 0, 0, 1]]).bool())
    assert removed.tolist() == [[1]]
