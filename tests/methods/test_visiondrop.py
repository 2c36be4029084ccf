"""VisionDrop: the published script's counts, averages, and what cannot be."""

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA

import vlmprune
from vlmprune.errors import BudgetError, ParameterError, UnknownNameError
from vlmprune.methods import VisionDrop, VisionDropStages
from vlmprune.methods.input.visionzip_plan import tile_share


def counts(method, total, layers=32):
    """What enters, and what is left from each stage on."""
    stages = [part for part in method.parts() if isinstance(part, VisionDropStages)]
    entered = method.budget(total)
    cuts = stages[0].schedule(entered, layers) if stages else ()
    return entered, [tuple(cut) for cut in cuts]


def average(method, total, layers=32):
    entered, cuts = counts(method, total, layers)
    seen = [entered] * layers
    for cut, count in cuts:
        seen[cut:] = [min(count, seen[cut])] * (layers - cut)
    return sum(seen) / layers


def test_the_published_script():
    assert counts(VisionDrop(keep=32), 576) == (48, [(8, 35), (16, 26), (24, 19)])
    assert tile_share(576, 48, VisionDrop().contextual, True) == (41, 6, 1)
    batch = type("Batch", (), {"budgets": (35, 26, 19), "counts": (48, 35, 26)})
    assert VisionDropStages(keep=32).contextual(batch) == (5, 4, 3)
    assert average(VisionDrop(keep=32), 576) == 32


@pytest.mark.parametrize(("keep", "entered"), [(64, 96), (128, 192), (192, 288)])
def test_the_papers_targets(keep, entered):
    assert counts(VisionDrop(keep=keep), 576)[0] == entered
    assert average(VisionDrop(keep=keep), 576) == pytest.approx(keep, abs=0.5)
    # Five tiles of 576.
    assert counts(VisionDrop(keep=5 * keep), 2880)[0] == 5 * entered
    assert average(VisionDrop(keep=5 * keep), 2880) == pytest.approx(5 * keep, abs=0.5)


@pytest.mark.parametrize("layers", [4, 6, 28, 32, 40])
@pytest.mark.parametrize("keep", [0.05, 0.25, 0.5, 0.7, 0.95, 100, 500])
def test_keep_is_the_average_over_layers(keep, layers):
    wanted = keep if isinstance(keep, int) else keep * 576
    assert average(VisionDrop(keep=keep), 576, layers) == pytest.approx(wanted, abs=1)
    assert counts(VisionDrop(keep=1.0), 576) == (576, [])
    assert counts(VisionDrop(keep=576), 576) == (576, [])


def test_small_images():
    for total in range(1, 12):
        for keep in (1, 2, 0.3, 0.8):
            entered, cuts = counts(VisionDrop(keep=keep), total, 8)
            assert 1 <= entered <= total
            assert all(1 <= count <= entered for _, count in cuts)


def test_groups_and_values_of_every_stage():
    model, inputs = DEEP_LLAVA.build(torch.float32), DEEP_LLAVA.inputs([[3, "A", 4], [2, "B", 1, "C", 6]])
    with torch.no_grad(), vlmprune.pruned(model, "visiondrop", keep=12):
        model(**inputs)
        run = vlmprune.last_run(model)
    for image in run.images:
        sizes = [len(kept) for _, kept in image.stages]
        assert sizes == [18, *(count for _, count in counts(VisionDrop(keep=12), 36, 8)[1])]
        assert 0 <= image.groups.min() <= image.groups.max() < 18
        for number, (layer, groups) in enumerate(image.stage_groups):
            assert layer == image.stages[number + 1][0]
            assert len(groups) == sizes[number]
            # Nothing is lost: what is not dominant is merged.
            assert sorted(set(groups.tolist())) == list(range(sizes[number + 1]))
            assert image.stages[number][1][groups == 0].tolist() == image.stages[number + 1][1][:1].tolist()
    assert "received_attention" in run.signal or "cls_attention" in run.signal
    assert "visual attention layer 2, 4, 6" in run.signal


def test_bad_parameters():
    with pytest.raises(ParameterError, match="has 2 stages; allowed: 3"):
        VisionDrop(layers=(2, 4))
    with pytest.raises(ParameterError, match="allowed: counts of every one of the layers"):
        VisionDropStages(counts=((3, 1),))
    with pytest.raises(UnknownNameError, match="layers="):
        VisionDrop(layer_list=(8, 16, 24))
    with pytest.raises(BudgetError, match="all visual tokens pass the first 7 layers"):
        VisionDropStages(keep=0.2, layers=(7, 8, 9)).schedule(100, 10)
