"""DART: the official counts, and what cannot be."""

import pytest
import torch

import vlmprune
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import BudgetError, ParameterError, UnknownNameError
from vlmprune.methods import DART


def cuts(method, total, layers=32):
    return [tuple(cut) for cut in method.schedule(total, layers)]


@pytest.mark.parametrize(
    ("tokens", "total", "kept"), [(192, 576, 196), (128, 576, 132), (64, 576, 68), (320, 2880, 324), (320, 2144, 324)]
)
def test_official_counts(tokens, total, kept):
    assert cuts(DART(tokens=tokens), total) == [(2, kept)]


@pytest.mark.parametrize(("ratio", "total", "kept"), [(0.778, 1296, 4 + 8 * 35), (0.667, 1296, 4 + 8 * 53)])
def test_official_counts_of_qwen(ratio, total, kept):
    assert cuts(DART(ratio=ratio), total, 28) == [(2, kept)]


def test_small_images_and_averages():
    assert cuts(DART(tokens=128), 3) == [(2, 3)]
    assert cuts(DART(tokens=7), 100) == [(2, 4)]
    for keep in (0.25, 0.5, 150):
        (cut,) = DART(keep=keep).schedule(576, 32)
        average = (2 * 576 + 30 * cut.tokens) / 32
        assert abs(average - (keep if isinstance(keep, int) else keep * 576)) < 0.5
    assert cuts(DART(keep=1.0), 576) == []
    assert DART().cut_layers(32) == DART().cut_layers(28) == (2,)
    assert DART().cut_layers(8) == DART(keep=0.5).cut_layers(4) == (1,)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0.5, "tokens": 64}, "keep=0.5 and tokens=64 set the budget"),
        ({"tokens": 0}, "tokens=0; allowed: an int >= 1"),
        ({"ratio": 1.0}, r"ratio=1.0; allowed: a number in \[0, 1\)"),
        ({"image_pivots": 0, "text_pivots": 0}, "at least one pivot"),
        ({"layer": 0}, "layer holds 0"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(ParameterError, match=message):
        DART(**parameters)


def test_names_and_depths():
    with pytest.raises(UnknownNameError, match="tokens="):
        vlmprune.apply(LLAVA_CLIP_GQA.build(torch.float32), "dart", max_num_trunction=128)
    with pytest.raises(BudgetError, match=r"nearest: keep=0\.07"):
        DART(keep=0.05).cut_layers(32)
    with pytest.raises(ParameterError, match="layer holds 40"):
        DART(layer=40).cut_layers(32)
