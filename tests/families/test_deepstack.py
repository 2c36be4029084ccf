"""Deep visual features follow the visual tokens that are kept."""

import pytest
import torch

import vlmprune
from support.families.by_hand import check_pruned, language_model_inputs, placeholders, row_by_hand
from support.families.qwen3_vl import CASES, QWEN3_VL
from vlmprune.methods import DivPrune, Pool
from vlmprune.patches.prefill.compaction import plan_compaction
from vlmprune.patches.prefill.deepstack import compact_deepstack


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
    assert cut["visual_pos_masks"].tolist() == [
        [False, True, False, True, True, False],
        [False, False, True] + [False] * 3,
    ]
    assert [feature.flatten().tolist() for feature in cut["deepstack_visual_embeds"]] == [
        [11, 13, 14, 16],
        [21, 23, 24, 26],
    ]
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


ROWS = [[3, "A", 4], [2, "small", 1, "large", 6], [9]]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


@over_cases
@pytest.mark.parametrize("method", ["random", "uniform", "divprune", "fastervlm"])
def test_pruned_call_equals_the_unpatched_language_model_by_hand(case, method):
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    given = language_model_inputs(model, inputs)
    assert len(given["deepstack_visual_embeds"]) == 3
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=6, do_sample=False)[:, -6:]
    assert [(image.batch_index, image.total) for image in run.images] == [(0, 36), (1, 16), (1, 48)]
    check_pruned(model, inputs, run, logits, new, given)


@over_cases
def test_merged_tokens_get_deep_features_merged_the_same_way(case):
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    given = language_model_inputs(model, inputs)
    visual = placeholders(model, inputs["input_ids"])
    rank = visual.flatten().cumsum(0).view_as(visual) - 1
    with torch.no_grad(), vlmprune.pruned(model, "pool", keep=0.3):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
    for row in range(2):
        columns, mine = row_by_hand(model, inputs, run, row, given)[0], visual[row].nonzero().flatten()
        embeddings = given["inputs_embeds"][row, columns]
        deep = [[] for _ in given["deepstack_visual_embeds"]]
        for image in (image for image in run.images if image.batch_index == row):
            here, mine = mine[: image.total], mine[image.total :]
            embeddings[torch.isin(columns, here)] = averaged(given["inputs_embeds"][row, here], image)
            for layer, features in zip(deep, given["deepstack_visual_embeds"], strict=True):
                layer.append(averaged(features[rank[row, here]], image))
        changed = {"inputs_embeds": embeddings, "deepstack_visual_embeds": [torch.cat(layer) for layer in deep]}
        _, expected = row_by_hand(model, inputs, run, row, given, changed=changed)
        torch.testing.assert_close(logits[row, columns], expected, atol=2e-5, rtol=1e-4)


def averaged(values, image):
    """The cells of a grid that is pooled to as many tokens as are kept."""
    rows = (image.kept // image.grid[1]).unique().numel()
    target = (rows, image.kept.numel() // rows)
    return torch.nn.functional.adaptive_avg_pool2d(values.T.view(1, -1, *image.grid), target)[0].flatten(1).T


@pytest.mark.parametrize("method", [DivPrune(keep=0.3), Pool(keep=0.3)], ids=["prunes", "merges"])
def test_beams_and_return_sequences_repeat_the_deep_features(method):
    model, inputs = QWEN3_VL.build(torch.float32), QWEN3_VL.inputs(ROWS)

    def entering(**options):
        seen = []
        with torch.no_grad(), vlmprune.pruned(model, method):
            handle = model.model.language_model.register_forward_pre_hook(
                lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
            )
            try:
                model.generate(**inputs, max_new_tokens=2, **options)
            finally:
                handle.remove()
        return seen[0]

    alone, beams = entering(do_sample=False), entering(do_sample=False, num_beams=3, num_return_sequences=2)
    assert torch.equal(beams["visual_pos_masks"], alone["visual_pos_masks"].repeat_interleave(3, 0))
    for one, three in zip(alone["deepstack_visual_embeds"], beams["deepstack_visual_embeds"], strict=True):
        rows = one.split(alone["visual_pos_masks"].sum(1).tolist())
        torch.testing.assert_close(three, torch.cat([row for row in rows for _ in range(3)]))


def test_deep_features_of_dropped_tokens_have_no_effect():
    model, inputs = QWEN3_VL.build(torch.float32), QWEN3_VL.inputs([[3, "A", 4]])
    merger = model.model.visual.deepstack_merger_list[1]
    with torch.no_grad(), vlmprune.pruned(model, "uniform", keep=0.3):
        logits = model(**inputs).logits[:, -1]
        kept = vlmprune.last_run(model).images[0].kept
        dropped = torch.ones(36, 1)
        dropped[kept] = 0
        for wrong, changes in ((dropped, False), (1 - dropped, True)):
            handle = merger.register_forward_hook(lambda module, args, output, wrong=wrong: output + 9 * wrong)
            try:
                assert torch.equal(model(**inputs).logits[:, -1], logits) != changes
            finally:
                handle.remove()
