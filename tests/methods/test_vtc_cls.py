"""The layers that VTC-CLS sums over."""

import pytest

from vlmprune.errors import ParameterError
from vlmprune.methods import VTCCLS
from vlmprune.methods.batch import TowerFacts

CLIP_L = TowerFacts(layers=24, feature_layer=22, has_cls=True)


@pytest.mark.parametrize(
    ("start", "tower", "layers"),
    [
        (-8, CLIP_L, range(16, 23)),
        (16, CLIP_L, range(16, 23)),
        (22, CLIP_L, [22]),
        (-24, CLIP_L, range(23)),
        (-99, CLIP_L, range(23)),
        (-8, TowerFacts(4, 2, True), range(3)),
        (-8, TowerFacts(26, 25, False), range(18, 26)),
    ],
)
def test_layers(start, tower, layers):
    signals = VTCCLS(start_layer=start).vision_signals(tower)
    assert [signal.layer for signal in signals] == list(layers)
    assert {signal.kind for signal in signals} == {"cls_attention" if tower.has_cls else "received_attention"}


@pytest.mark.parametrize("start", [23, 24, -1])
def test_an_empty_sum_is_refused(start):
    with pytest.raises(ParameterError, match="nearest: 22"):
        VTCCLS(start_layer=start).vision_signals(CLIP_L)


@pytest.mark.parametrize("start", ["16", 1.5, True])
def test_a_layer_is_an_int(start):
    with pytest.raises(ParameterError, match="start_layer"):
        VTCCLS(start_layer=start)
