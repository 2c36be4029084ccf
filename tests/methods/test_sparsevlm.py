"""SparseVLM: the official counts, budgets that are solved, and what cannot be."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import vlmprune
from support.deeper import deeper
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import BudgetError, ParameterError, UnknownNameError, UnsupportedCallError
from vlmprune.methods import SparseVLM
from vlmprune.methods.layer.sparsevlm_schedule import recycling, recycling_to
from vlmprune.methods.shared.density_peaks import density_peaks


def cuts(method, total=576, layers=32):
    return [tuple(cut) for cut in method.schedule(total, layers)]


def average(method, total=576, layers=32):
    seen = [total] * layers
    for cut, count in cuts(method, total, layers):
        seen[cut:] = [count] * (layers - cut)
    return sum(seen) / layers


@pytest.mark.parametrize(
    ("retained", "with_recycled", "true_average"),
    [
        (192, (309, 204, 113), 206.5),
        (128, (312, 117, 39), 145.4),
        (96, (249, 55, 27), 114.1),
        (64, (82, 32, 18), 82.3),
    ],
)
def test_official_counts(retained, with_recycled, true_average):
    method = SparseVLM(retained=retained)
    assert cuts(method) == list(zip((3, 7, 16), with_recycled, strict=True))
    assert average(method) == pytest.approx(true_average, abs=0.06)


def test_official_counts_of_version_2():
    assert cuts(SparseVLM(retained=64, variant="v2")) == [(3, 66), (7, 34), (16, 20)]


@pytest.mark.parametrize(("ratio", "target"), [(0.3125, 960), (0.1979, 640), (0.0833, 320), (0.0261, 160)])
def test_official_counts_of_2880_tokens(ratio, target):
    assert cuts(SparseVLM(layers=(3,), ratios=(ratio,)), 2880) == [(3, target)]


@pytest.mark.parametrize(("ratio", "target"), [(0.3333, 960), (0.2222, 640), (0.1111, 320), (0.0555, 160)])
def test_official_counts_of_2880_tokens_without_recycling(ratio, target):
    assert cuts(SparseVLM(layers=(3,), ratios=(ratio,), recycle=0), 2880) == [(3, target)]


def test_lists_scale_with_tokens_and_depth():
    assert cuts(SparseVLM(retained=192), 2880)[0] == (3, recycling(2880, 1500, 0.3, 10).total)
    assert SparseVLM(retained=192).cut_layers(28) == (3, 6, 14)
    assert SparseVLM().cut_layers(32) == (3, 7, 16)
    assert SparseVLM(keep=0.05).cut_layers(32) == (1, 7, 16)


@pytest.mark.parametrize("keep", [0.06, 0.15, 0.25, 0.5, 0.9, 40, 128, 300])
@pytest.mark.parametrize("variant", ["v1", "v2"])
def test_keep_is_the_average_over_layers(keep, variant):
    wanted = keep if isinstance(keep, int) else keep * 576
    assert average(SparseVLM(keep=keep, variant=variant)) == pytest.approx(wanted, abs=0.8)
    assert cuts(SparseVLM(keep=1.0)) == []


@given(alive=st.integers(2, 3000), data=st.data())
@settings(max_examples=60, deadline=None)
def test_a_stage_meets_its_total(alive, data):
    total = data.draw(st.integers(1, alive - 1))
    stage = recycling_to(alive, total, 0.3, 10)
    assert stage.total == total
    assert stage.kept >= 1
    assert stage.clusters <= stage.recycled <= alive - stage.kept
    official = recycling(alive, data.draw(st.integers(1, alive - 1)), 0.3, 10)
    assert official.clusters == int((int(0.3 * (alive - official.kept)) + 1) / 10) + 1


def test_centres_are_in_their_own_clusters():
    features = torch.randn(40, 8)
    centres, groups = density_peaks(features, 5)
    assert groups[centres].tolist() == list(range(5))
    assert set(groups.tolist()) == set(range(5))
    same, all_of_one = density_peaks(torch.ones(4, 3), 2)
    assert same.tolist() == [0, 1]
    assert all_of_one.tolist() == [0, 1, 0, 0]


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0.5, "retained": 192}, "keep=0.5 and retained=192 set the budget"),
        ({"retained": 150}, "retained=150; allowed: the official lists 192, 128, 96, 64; nearest: 128"),
        ({"retained": 0.5}, "retained=0.5"),
        ({"tokens": (10, 0)}, r"tokens\[1\]=0"),
        ({"ratios": (0.5, 1.5)}, r"ratios\[1\]=1.5"),
        ({"layers": (2,), "tokens": (10, 5)}, "one a layer"),
        ({"tokens": (9, 8, 7, 6)}, "3 at most"),
        ({"recycle": 1.0}, "recycle=1.0"),
        ({"cluster_size": 0}, "cluster_size=0"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(ParameterError, match=message):
        SparseVLM(**parameters)


def test_names_depths_and_budgets():
    with pytest.raises(UnknownNameError, match="retained="):
        SparseVLM(retained_tokens=192)
    with pytest.raises(UnknownNameError, match="v1"):
        SparseVLM(variant="v3")
    with pytest.raises(BudgetError, match=r"nearest: keep=0\.04"):
        SparseVLM(keep=0.03).cut_layers(32)
    with pytest.raises(ParameterError, match="leave room for 1"):
        SparseVLM(retained=192).cut_layers(2)


def test_an_image_that_no_text_follows_is_refused_before_the_first_layer():
    family = deeper(LLAVA_CLIP_GQA)
    model, ran = family.build(torch.float32), []
    model.model.language_model.layers[0].register_forward_hook(lambda *_: ran.append(1))
    with torch.no_grad(), vlmprune.pruned(model, "sparsevlm", keep=0.5):
        with pytest.raises(UnsupportedCallError, match=r"Row 1 ends with an image.*'sparsevlm'"):
            model(**family.inputs([[3, "A", 4], [3, "A"]]))
        assert not ran
        model(**family.inputs([[3, "A", 4]]))
