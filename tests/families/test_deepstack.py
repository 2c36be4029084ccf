"""Deep visual features follow the visual tokens that are kept."""

import torch

from vlmprune.patches.compaction import plan_compaction
from vlmprune.patches.deepstack import compact_deepstack


def example():
    visual = torch.tensor([[0, 1, 1, 1, 0, 1, 1, 0], [0, 0, 0, 1, 1, 0, 0, 0]]).bool()
    valid = torch.tensor([[1] * 8, [0, 0, 1, 1, 1, 1, 1, 1]]).bool()
    kept = torch.tensor([[0, 0, 1, 0, 0, 1, 1, 0], [0, 0, 0, 0, 1, 0, 0, 0]]).bool()
    keep = (valid & ~visual) | kept
    compaction = plan_compaction(keep, visual, tuple(keep.sum(1).tolist()), (2, 1))
    features = [torch.arange(7.0)[:, None] + 10 * layer for layer in (1, 2)]
    return visual, kept.flatten().nonzero().flatten(), compaction, features


def test_features_and_mask_are_those_of_the_kept_tokens():
    visual, kept, compaction, features = example()
    shuffled = kept[torch.tensor([2, 0, 3, 1])]
    kwargs = {"visual_pos_masks": visual, "deepstack_visual_embeds": features, "use_cache": True}
    cut = compact_deepstack(kwargs, compaction, shuffled)
    assert cut["visual_pos_masks"].tolist() == [[False, True, False, True, True, False], [False, False, True] + [False] * 3]
    assert [feature.flatten().tolist() for feature in cut["deepstack_visual_embeds"]] == [[11, 13, 14, 16], [21, 23, 24, 26]]
    assert cut["use_cache"] is True
    assert kwargs["visual_pos_masks"] is visual, "the caller's arguments stay as they are"


def test_merged_features_come_in_the_order_of_the_kept_columns():
    visual, kept, compaction, features = example()
    order = torch.tensor([2, 0, 3, 1])
    source = torch.tensor([1, 3, 4, 6])
    cut = compact_deepstack(
        {"visual_pos_masks": visual, "deepstack_visual_embeds": features},
        compaction,
        kept[order],
        merged=lambda feature: feature[source[order]] * 2,
    )
    assert cut["deepstack_visual_embeds"][0].flatten().tolist() == [22, 26, 28, 32]


def test_nothing_to_do_without_deep_features():
    _, kept, compaction, _ = example()
    kwargs = {"inputs_embeds": torch.zeros(2, 8, 4)}
    assert compact_deepstack(kwargs, compaction, kept) is kwargs
    assert compact_deepstack({"visual_pos_masks": None, "deepstack_visual_embeds": None}, compaction, kept)
