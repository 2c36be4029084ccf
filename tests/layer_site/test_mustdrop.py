"""MustDrop's plan and counts, its tests in plain loops, images that decide, and its parameters."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.deeper_tower import deeper_tower
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import BudgetError, ParameterError, UnsupportedCallError
from vlmprune.methods import MustDrop, MustDropFilter
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.encoder.mustdrop import merge_windows, window_likeness
from vlmprune.methods.encoder_method import BlockBatch
from vlmprune.methods.layer.mustdrop_filter import FilterScores, important, key_set, scaled_strength

CLIP = TowerFacts(layers=24, feature_layer=22, has_cls=True)
FAMILY = deeper(deeper_tower(LLAVA_CLIP_GQA))
# Some windows of most pictures are as like as that, none of others.
BETWEEN = 0.2
ROWS = [[3, "A", 4, 7], [2, "B", 1, "C", 6, 9], [5, "D", 2]]


def test_the_papers_layers_and_the_forced_counts():
    stages = MustDrop().parts()[1]
    assert stages.cut_layers(32) == (3, 7, 11, 15)
    assert stages.trims_cache(32) == 2
    assert MustDropFilter(layers=(2, 6, 20)).cut_layers(32) == (3, 7, 21)
    # As many windows as leave K tokens or a few more: (576 - 192) // 8 = 48, and 56 and 64 for 128 and 64.
    for wanted, windows in ((192, 48), (128, 56), (64, 64)):
        assert MustDrop(keep=(wanted / 576) ** 2).plan(576, CLIP) == (576 - 8 * windows,) * 23
    assert MustDrop(keep=1.0).plan(576, CLIP) == (576,) * 23
    assert MustDrop(keep=round(576 / 9)).plan(576, CLIP)[0] == 192


def test_official_counts_of_crops():
    """Five crops of 576 patches: K of each where it is forced, else 576 - 8 r, r of the one with the fewest like windows."""
    for wanted, windows in ((192, 48), (128, 56), (64, 64)):
        method = MustDrop(keep=(wanted / 576) ** 2)
        hidden = torch.randn(5, 577, 8)
        removed = 576 - method.plan(576, CLIP)[0]
        reduced = method.reduce(BlockBatch(block=0, hidden=hidden, remove=removed, tower=CLIP, leading=1))
        assert reduced.values.shape[:2] == (5, 1 + 576 - 8 * windows)
    like = (28, 40, 64, 31, 50)
    hidden = torch.randn(5, 577, 64)
    for tile, windows in enumerate(like):
        rows = hidden[tile, 1:].view(8, 3, 8, 3, 64)
        for window in range(windows):
            rows[window // 8, :, window % 8] = torch.randn(64)
    for faithful, counts in ((True, (28,) * 5), (False, like)):
        batch = BlockBatch(block=0, hidden=hidden, remove=0, tower=CLIP, leading=1)
        assert MustDrop(faithful=faithful).removed(batch) == [8 * count for count in counts]
    # 352 patches a crop are left, of which 29 are protected.
    assert len(key_set(torch.rand(576 - 8 * 28), 0.08)) == 29


def test_windows_in_plain_loops():
    hidden = torch.randn(2, 1 + 36, 8) + torch.randn(2, 37, 1) * 2
    likeness = window_likeness(hidden[:, 1:], (3, 3))
    for tile in range(2):
        grid, found = hidden[tile, 1:].view(6, 6, 8), []
        for window in range(4):
            top, left = divmod(window, 2)
            members = grid[3 * top : 3 * top + 3, 3 * left : 3 * left + 3].reshape(9, 8)
            pairs = [
                torch.cosine_similarity(members[a], members[b], dim=0) for a in range(9) for b in range(9) if a != b
            ]
            found.append((float(torch.stack(pairs).mean()), members.mean(0), (3 * top + 1) * 6 + 3 * left + 1))
            assert found[-1][0] == pytest.approx(float(likeness[tile, window]), abs=1e-5)
        reduction = merge_windows(hidden, 1, (3, 3), 16)
        for output, (_, mean, centre) in enumerate(sorted(found, key=lambda entry: -entry[0])[:2], 1):
            torch.testing.assert_close(reduction.values[tile, output], mean)
            assert int(reduction.targets[tile, output]) == 1 + centre
            assert int((reduction.groups[tile] == output).sum()) == 9
        assert reduction.sizes[tile].tolist() == [1.0, 9.0, 9.0, *[1.0] * 18]
        alone = reduction.targets[tile, 3:]
        assert alone.tolist() == sorted(alone.tolist())
        torch.testing.assert_close(reduction.values[tile, 3:], hidden[tile, alone])


def test_a_scale_of_the_thresholds_is_a_rank():
    attention = torch.rand(5, 40).softmax(-1)
    scores = FilterScores(attention.sum(0), attention.amax(0))
    strength = scaled_strength(scores, 0.02, 0.03)
    for scale in (0.5, 0.9, 1.1, 1.5):
        assert torch.equal(important(scores, 0.02 * scale, 0.03 * scale), strength >= scale)


@torch.no_grad()
def test_what_the_model_keeps_in_plain_loops():
    """The first filter against eager attention of the model without the filter, row by row."""
    model = FAMILY.build(torch.float32)
    method = MustDrop(keep=0.5, layers=(2,), key_rate=0.2)
    inputs = FAMILY.inputs(ROWS)
    with vlmprune.pruned(model, method):
        model(**inputs)
        run = vlmprune.last_run(model)
    tower_only = MustDrop(keep=0.5, layers=(2,), key_rate=1.0, global_threshold=1e-9)
    assert run.images[0].stages[0][1].numel() == tower_only.plan(36, CLIP)[0]
    for image in run.images:
        (_, entered), (layer, kept) = image.stages
        assert layer == 3
        assert set(kept.tolist()) <= set(entered.tolist())
        assert (3 * len(entered) + 3 * len(kept)) / 6 == pytest.approx(18, abs=1)
    for row, prompt in enumerate(ROWS):
        with vlmprune.pruned(model, method):
            model(**FAMILY.inputs([prompt]))
            alone = vlmprune.last_run(model).images
        mine = [image for image in run.images if image.batch_index == row]
        assert [image.kept.tolist() for image in mine] == [image.kept.tolist() for image in alone]


@torch.no_grad()
def test_the_images_decide():
    model = FAMILY.build(torch.float32)
    prompt = FAMILY.inputs([[3, "A", 4, 7]])
    windows = {}
    for threshold in (-1.0, 0.1, 1.0):
        with vlmprune.pruned(
            model, "mustdrop", merge_threshold=threshold, global_threshold=0.03, individual_threshold=0.1
        ):
            cache = model(**prompt, use_cache=True).past_key_values
            run = vlmprune.last_run(model)
            generated = model.generate(**prompt, max_new_tokens=3, do_sample=False)
        windows[threshold] = len(run.images[0].stages[0][1])
        assert generated.shape[1] == prompt["input_ids"].shape[1] + 3
        # Every layer from the first filtered one on holds the last set and the text.
        held = {layer.keys.shape[2] for layer in cache.layers}
        assert held == {3 + 4 + 7 + len(run.images[0].kept)}
    assert windows[-1.0] == 4
    assert windows[1.0] == 36
    assert windows[-1.0] <= windows[0.1] <= windows[1.0]


@torch.no_grad()
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_every_tile_merges_its_own_windows(attention):
    model = FAMILY.build(torch.float32)
    model.set_attn_implementation(attention)
    inputs = FAMILY.inputs(ROWS)
    thresholds = {"merge_threshold": BETWEEN, "global_threshold": 0.03, "individual_threshold": 0.1}
    with vlmprune.pruned(model, "mustdrop", **thresholds):
        together = model(**inputs).logits
        run = vlmprune.last_run(model)
        generated = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        for row, prompt in enumerate(ROWS):
            single = FAMILY.inputs([prompt])
            alone = model(**single).logits[0]
            torch.testing.assert_close(together[row, inputs["attention_mask"][row].bool()], alone, atol=2e-5, rtol=1e-4)
            mine = [image for image in run.images if image.batch_index == row]
            for image, other in zip(mine, vlmprune.last_run(model).images, strict=True):
                assert image.stages[0][1].tolist() == other.stages[0][1].tolist()
                assert image.kept.tolist() == other.kept.tolist()
                # Alone, a tile without a window to merge leaves the tower as it is.
                whole = torch.arange(image.total)
                groups = [whole if own.tower_groups is None else own.tower_groups.flatten() for own in (image, other)]
                assert groups[0].tolist() == groups[1].tolist()
            assert (
                model.generate(**single, max_new_tokens=4, do_sample=False)[0, -4:].tolist() == generated[row].tolist()
            )
    entered = [len(image.stages[0][1]) for image in run.images]
    assert len(set(entered)) > 1, "tiles differ"
    with vlmprune.pruned(model, "mustdrop", **thresholds, faithful=True):
        model(**inputs)
        assert {len(image.stages[0][1]) for image in vlmprune.last_run(model).images} == {max(entered)}


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"output": "full"}, "output='full'; allowed: 'merged'"),
        ({"window": 3}, "window=3; allowed: two ints"),
        ({"window": (3, 0)}, r"window=\(3, 0\)"),
        ({"key_rate": 2}, r"key_rate=2; allowed: a number in \[0, 1\]"),
        ({"global_threshold": 0.0}, r"global_threshold=0\.0"),
        ({"layers": (6, 2)}, r"layers=\(6, 2\)"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(ParameterError, match=message):
        MustDrop(**parameters)


def test_what_does_not_fit_a_model():
    with pytest.raises(ParameterError, match=r"window=\(5, 5\) does not divide the tower's 576 patches \(24 x 24\)"):
        MustDrop(window=(5, 5)).plan(576, CLIP)
    with pytest.raises(BudgetError, match="first 3 layers"):
        MustDropFilter(keep=0.005).cut_layers(32)
    model = FAMILY.build(torch.float32)
    refused = pytest.raises(UnsupportedCallError, match="Row 0 ends with an image")
    with torch.no_grad(), vlmprune.pruned(model, "mustdrop", keep=0.5), refused:
        model(**FAMILY.inputs([[3, "A"]]))
