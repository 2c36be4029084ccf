"""ToMe in the towers of Qwen's models: against plain loops, in batches, with other methods, undone."""

from itertools import pairwise

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.deeper_tower import deeper_tower
from support.families import glm4v, qwen2_5_vl, qwen2_vl, qwen3_vl
from support.plain_methods.expedite import expedite
from support.plain_methods.expedite_packed import expedite_packed_tower
from support.plain_methods.tome_packed import tome_packed_tower
from vlmprune.errors import BudgetError, UnsupportedMethodError
from vlmprune.methods import DivPrune, Expedite, FasterVLM, PyramidDrop, ToMe
from vlmprune.patches.families.registry import find_family

FAMILIES = [deeper_tower(case) for case in (qwen2_vl.CASES[0], qwen2_5_vl.CASES[0], qwen3_vl.CASES[0], glm4v.GLM4V)]
ROWS = [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]]
over_families = pytest.mark.parametrize("family", FAMILIES, ids=str)
# The host of GLM-4V takes no images beside videos.
over_families_with_both = pytest.mark.parametrize("family", FAMILIES[:3], ids=str)


def tower_outputs(model, inputs):
    """What the tower's blocks give that somebody reads: what the merger gets, and the deepstack mergers."""
    tower, seen = model.model.visual, []
    # Behind the blocks of GLM-4V's tower are a norm and a convolution.
    modules = [getattr(tower, "post_layernorm", tower.merger), *getattr(tower, "deepstack_merger_list", ())]
    handles = [
        module.register_forward_pre_hook(lambda module, args, number=number: seen.append((number, args[0].clone())))
        for number, module in enumerate(modules)
    ]
    model(**inputs)
    for handle in handles:
        handle.remove()
    return [rows for _, rows in sorted(seen, key=lambda item: item[0])]


@over_families
@pytest.mark.parametrize("proportional", [True, False])
def test_against_plain_loops(family, proportional):
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    method = ToMe(keep=0.55, proportional_attention=proportional)
    tower, facts = model.model.visual, find_family(model).tower_facts
    merge = tower.spatial_merge_size
    plans = []
    for frames, rows, columns in inputs["image_grid_thw"].tolist():
        units = rows * columns // merge**2
        plan = [before - after for before, after in pairwise((units, *method.plan(units, facts)))]
        plans += [plan] * frames
    outputs = tome_packed_tower(model, inputs["pixel_values"], inputs["image_grid_thw"], plans, proportional)
    with torch.no_grad(), vlmprune.pruned(model, method):
        found = tower_outputs(model, inputs)
    blocks = [len(tower.blocks) - 1, *(getattr(tower, "deepstack_visual_indexes", None) or ())]
    for rows, block in zip(found, blocks, strict=True):
        torch.testing.assert_close(rows.reshape(len(outputs[block]), -1), outputs[block], atol=3e-5, rtol=1e-4)


@over_families
@pytest.mark.parametrize("weights", ["mean", "l2"])
def test_expedite_against_plain_loops(family, weights):
    model, inputs = family.build(torch.float32), family.inputs([[3, "A", 4], [2, "B", 1, "small", 6]])
    method = Expedite(clusters=(3, 2), layer=1, k=4, weights=weights)
    reduce = expedite((3, 2), k=4, weights=weights)
    outputs = expedite_packed_tower(model, inputs["pixel_values"], inputs["image_grid_thw"], 1, reduce)
    with torch.no_grad(), vlmprune.pruned(model, method):
        found = tower_outputs(model, inputs)
    tower = model.model.visual
    blocks = [len(tower.blocks) - 1, *(getattr(tower, "deepstack_visual_indexes", None) or ())]
    for rows, block in zip(found, blocks, strict=True):
        torch.testing.assert_close(rows.reshape(len(outputs[block]), -1), outputs[block], atol=1e-4, rtol=1e-3)


@over_families
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_identity_and_undo(family, dtype):
    model, inputs = family.build(dtype), family.inputs(ROWS, dtype=dtype)
    with torch.no_grad():
        logits = model(**inputs).logits
        tables = {name: list(module._forward_hooks) for name, module in model.named_modules()}
        for method in ("tome", "expedite"):
            with vlmprune.pruned(model, method, keep=1.0):
                assert torch.equal(model(**inputs).logits, logits)
            with vlmprune.pruned(model, method, keep=0.6):
                assert not torch.equal(model(**inputs).logits, logits)
        assert {name: list(module._forward_hooks) for name, module in model.named_modules()} == tables
        assert torch.equal(model(**inputs).logits, logits)


@over_families
@pytest.mark.parametrize("method", [ToMe(keep=0.6), Expedite(keep=0.6)], ids=lambda method: method.name)
def test_a_row_in_a_batch_is_the_row_alone_and_all_tokens_stay(family, method):
    model, batch = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, method):
        together = model(**batch).logits
        images = vlmprune.last_run(model).images
        for row, items in enumerate(ROWS):
            alone = model(**family.inputs([items])).logits[0]
            torch.testing.assert_close(together[row, batch["attention_mask"][row].bool()], alone, atol=5e-4, rtol=1e-2)
    for image in images:
        assert image.kept.tolist() == list(range(image.total))
        assert image.tower_groups.shape == (1, image.total)
        plan = method.plan_of_grid(image.grid, find_family(model).tower_facts)
        assert image.tower_groups.unique().numel() <= plan[-1] < image.total


@over_families_with_both
def test_frames_of_a_video_are_reduced_apart(family):
    model = family.build(torch.float32)
    rows = [[3, "video large", 4], [2, "A", 1], [1, "video small", 2]]
    with torch.no_grad(), vlmprune.pruned(model, "tome", keep=0.6):
        together = model(**family.inputs(rows)).logits
        mask = family.inputs(rows)["attention_mask"].bool()
        images = vlmprune.last_run(model).images
        for row, items in enumerate(rows):
            alone = model(**family.inputs([items])).logits[0]
            torch.testing.assert_close(together[row, mask[row]], alone, atol=3e-5, rtol=1e-4)
    for image in images:
        frames = len(image.layout.frame.unique())
        assert image.tower_groups.shape == (frames, image.total // frames)
        assert all(0 < len(groups.unique()) < groups.numel() for groups in image.tower_groups)


@over_families
@pytest.mark.parametrize("backend", ["eager", "sdpa"])
def test_backends_agree(family, backend):
    model, inputs = family.build(torch.float32), family.inputs(ROWS[:2])
    config = model.model.visual.config
    before = config._attn_implementation
    with torch.no_grad(), vlmprune.pruned(model, "tome", keep=0.5):
        expected = model(**inputs).logits
        try:
            config._attn_implementation = backend
            torch.testing.assert_close(model(**inputs).logits, expected, atol=3e-4, rtol=1e-3)
        finally:
            config._attn_implementation = before


@over_families
def test_with_methods_at_other_sites(family):
    family = deeper(family)
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad():
        for inner in (FasterVLM(keep=0.4), DivPrune(keep=0.4)):
            with vlmprune.pruned(model, [ToMe(keep=1.0), inner]):
                whole = model(**inputs).logits
            with vlmprune.pruned(model, inner):
                assert torch.equal(model(**inputs).logits, whole)
            with vlmprune.pruned(model, [ToMe(keep=0.6), inner, PyramidDrop(keep=0.5)]):
                assert not torch.equal(model(**inputs).logits, whole)
                for image in vlmprune.last_run(model).images:
                    assert len(image.stages[0][1]) == round(0.4 * image.total)


def test_attention_of_the_reduced_tower_is_mapped_back():
    """Each patch gets its share of what the token that it went into receives: all of it together is 1, as without merging."""
    family = FAMILIES[0]
    model, inputs = family.build(torch.float32), family.inputs([[3, "A", 4]])
    signal = FasterVLM().vision_signals(find_family(model).tower_facts)[0]
    seen = []

    class Reading(FasterVLM):
        def select(self, batch):
            seen.append(batch.vision[signal])
            return super().select(batch)

    with torch.no_grad(), vlmprune.pruned(model, [ToMe(keep=0.6), Reading(keep=0.5)]):
        model(**inputs)
        groups = vlmprune.last_run(model).images[0].tower_groups[0]
    scores = seen[0].mean(1)
    torch.testing.assert_close(scores.sum() * 4, torch.tensor(1.0), atol=1e-4, rtol=0)
    rounded = {round(float(score), 6) for score in scores}
    assert len(groups.unique()) <= len(rounded) < len(scores)


def test_what_is_refused():
    model = FAMILIES[0].build(torch.float32)
    with pytest.raises(UnsupportedMethodError, match="output='merged' one tile an image"):
        vlmprune.apply(model, ToMe(output="merged"))
    with pytest.raises(BudgetError, match="nearest: keep="):
        vlmprune.apply(model, ToMe(keep=0.05))
    assert not model.model.visual._forward_pre_hooks
