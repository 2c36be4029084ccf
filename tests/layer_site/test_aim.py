"""AIM's counts and parameters, its order of merged tokens, and masking in place of dropping."""

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA, cache_lengths

import vlmprune
from support.method_batches import anyres_layout, random_batch, raster_layout
from vlmprune.errors import BudgetError, ParameterError, UnknownNameError
from vlmprune.methods import AIM, AIMPageRank


def seen(method, total, layers):
    """Tokens that every layer sees of an image of `total` tokens."""
    entering = method.budget(total)
    alive = [entering] * layers
    for part in method.parts()[1:]:
        for cut in part.schedule(entering, layers):
            alive[cut.layer :] = [cut.tokens] * (layers - cut.layer)
    return alive


def test_the_papers_counts():
    video = AIM(merge_rounds=2, layers=(14, 22))
    assert seen(video, 196, 28) == [49] * 15 + [42, 36, 30, 24, 18, 12, 6] + [0] * 6
    assert seen(AIM(merge_rounds=2), 196, 28) == seen(video, 196, 28)
    llava = AIM(merge_rounds=3, layers=(13, 21))
    assert seen(llava, 576, 32) == [72] * 14 + [63, 54, 45, 36, 27, 18, 9] + [0] * 11
    assert seen(llava, 2880, 32) == [360] * 14 + [315, 270, 225, 180, 135, 90, 45] + [0] * 11
    assert sum(seen(AIM(merge_rounds=0, layers=(14, 22)), 56, 28)) / 28 / 56 == 18.5 / 28
    assert AIM(merge_rounds=1).budget(97) == 49


@pytest.mark.parametrize("layers", [6, 24, 28, 32, 40])
@pytest.mark.parametrize("keep", [0.05, 0.165, 0.25, 0.6, 0.7, 0.95])
def test_keep_is_the_average_over_layers(layers, keep):
    for given in (keep, round(2880 * keep)):
        assert sum(seen(AIM(keep=given), 2880, layers)) / layers == pytest.approx(2880 * keep, abs=1.5)


def test_keep_of_the_papers_average_is_its_schedule():
    assert AIMPageRank(keep=18.5 / 28).schedule(49, 28)[0] == (15, 43)
    assert [cut.layer for cut in AIMPageRank(keep=18.5 / 28).schedule(49, 28)] == list(range(15, 23))
    with pytest.raises(BudgetError, match=r"first 1 layers.*nearest: keep=0\.17"):
        AIMPageRank(keep=0.1).cut_layers(6)


def test_both_orders_hold_the_same_tokens():
    layouts = [raster_layout(5, 6), anyres_layout((2, 2), 4, 100, 150)]
    place, official = (AIM(keep=0.2, order=order) for order in ("position", "official"))
    batch = random_batch(place, layouts, 5)
    first, second = place.select(batch), official.select(batch)
    assert torch.equal(first.kept, second.kept)
    for ours, theirs in zip(
        first.features.split(list(first.counts)), second.features.split(list(second.counts)), strict=True
    ):
        assert not torch.equal(ours, theirs)
        torch.testing.assert_close(ours.sort(0).values, theirs.sort(0).values)
    torch.testing.assert_close(second.merge(batch.features), second.features)
    # A token that nothing joined has its own value where its group says.
    for selection in (first, second):
        for image, count in enumerate(selection.counts):
            span = slice(batch.offsets[image], batch.offsets[image + 1])
            groups, values = selection.groups[span], selection.features.split(list(selection.counts))[image]
            assert int(groups.max()) == count - 1
            alone = [number for number in range(count) if int((groups == number).sum()) == 1]
            tokens = [int((groups == number).nonzero()[0]) for number in alone]
            torch.testing.assert_close(values[alone], batch.features[span][tokens])


@torch.no_grad()
def test_faithful_masks_and_takes_nothing_out():
    model, rows = DEEP_LLAVA.build(torch.float32), [[3, "A", 4], [2, "B", 1, "C", 6, 9]]
    inputs = DEEP_LLAVA.inputs(rows)
    with vlmprune.pruned(model, AIM(merge_rounds=0, layers=(2, 6), faithful=True)):
        output = model(**inputs, use_cache=True)
        run = vlmprune.last_run(model)
        alone = [model(**DEEP_LLAVA.inputs([row])) for row in rows]
        single = vlmprune.last_run(model).images
        later = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, -4:]
        for row, prompt in enumerate(rows):
            assert torch.equal(
                model.generate(**DEEP_LLAVA.inputs([prompt]), max_new_tokens=4, do_sample=False)[0, -4:], later[row]
            )
    assert cache_lengths(output.past_key_values) == [inputs["input_ids"].shape[1]] * 8
    for row, one in enumerate(alone):
        torch.testing.assert_close(output.logits[row, -1], one.logits[0, -1], atol=2e-4, rtol=2e-4)
    for image, other in zip([image for image in run.images if image.batch_index == 1], single, strict=True):
        assert [kept.tolist() for _, kept in image.stages] == [kept.tolist() for _, kept in other.stages]
        assert [len(kept) for _, kept in image.stages] == [36, 27, 18, 9, 0]
    with vlmprune.pruned(model, AIM(merge_rounds=0, layers=(2, 6))):
        dropped = model(**inputs)
    assert not torch.allclose(dropped.logits[1, -1], output.logits[1, -1], atol=1e-3)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0.2, "merge_rounds": 2}, "keep=0.2 and merge_rounds=2 both set the budget"),
        ({"merge_rounds": -1}, "merge_rounds=-1; allowed: an int >= 0"),
        ({"layers": (5, 3)}, r"layers=\(5, 3\).*nearest: \(5, 6\)"),
        ({"layers": 4}, "layers=4; allowed: two ints"),
        ({"temperature": 0.0}, r"temperature=0\.0"),
        ({"iterations": 0}, "iterations=0"),
        ({"order": "offical"}, "Did you mean 'official'"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises((ParameterError, UnknownNameError), match=message):
        AIM(**parameters)
