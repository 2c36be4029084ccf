"""TransPrune's schedule and parameters, and what is counted as moved."""

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA

import vlmprune
from vlmprune.errors import BudgetError, ParameterError, UnknownNameError, UnsupportedCallError
from vlmprune.methods import TransPrune
from vlmprune.methods.layer.transprune import transition_variation, transprune_stages

HIGH = TransPrune(layers=(7, 9, 12), ratios=(0.875, 0.625, 0.125))


def average(method, total, layers):
    alive = [total] * layers
    for cut in method.schedule(total, layers):
        alive[cut.layer :] = [cut.tokens] * (layers - cut.layer)
    return sum(alive) / layers


def test_the_papers_counts():
    assert [tuple(cut) for cut in HIGH.schedule(576, 32)] == [(7, 504), (9, 360), (12, 72)]
    assert [cut.tokens for cut in HIGH.schedule(2880, 32)] == [2520, 1800, 360]
    assert average(HIGH, 576, 32) == 236.25
    assert [layer + 1 for _, layer in HIGH.layer_signals(32)[::2]] == [7, 8, 9, 10, 11, 12]
    assert TransPrune(ratios=HIGH.ratios).cut_layers(32) == (7, 9, 12)
    assert TransPrune(keep=236.25 / 576).schedule(576, 32) == HIGH.schedule(576, 32)


@pytest.mark.parametrize("layers", [2, 3, 6, 24, 28, 40])
@pytest.mark.parametrize("keep", [0.1, 0.25, 0.4, 0.6, 0.95])
def test_keep_is_the_average_over_layers(layers, keep):
    method = TransPrune(keep=keep)
    if keep * layers <= 1:
        with pytest.raises(BudgetError, match=r"nearest: keep="):
            method.cut_layers(layers)
        return
    assert average(method, 2880, layers) == pytest.approx(keep * 2880, abs=1.5)
    assert {cut.layer for cut in method.schedule(2880, layers)} <= set(method.cut_layers(layers))
    assert average(TransPrune(keep=round(keep * 2880)), 2880, layers) == pytest.approx(keep * 2880, abs=1.5)


def test_deeper_shares_are_powers_of_the_published_ones():
    cuts, shares = transprune_stages(0.3, 32)
    assert cuts == (7, 9, 12)
    powers = torch.tensor(shares).log() / torch.tensor(HIGH.ratios).log()
    torch.testing.assert_close(powers, powers[:1].expand(3))
    assert transprune_stages(0.2, 32)[0] == (1, 9, 12)
    assert len(transprune_stages(0.5, 32, (4, 8, 12, 16))[1]) == 4


def test_padding_neither_weighs_nor_moves():
    inputs, outputs = torch.randn(2, 6, 8), torch.randn(2, 6, 8)
    valid = torch.tensor([[False, False, True, True, True, True], [True] * 6])
    found = transition_variation(inputs, outputs, valid)
    torch.testing.assert_close(found[0, 2:], transition_variation(inputs[:1, 2:], outputs[:1, 2:], None)[0])
    assert found[0, :2].tolist() == [0, 0]
    turned = transition_variation(inputs, -inputs, None, "absolute")
    torch.testing.assert_close(turned, torch.full((2, 6), 1 / 6))


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"alpha": 1.5}, r"alpha=1.5; allowed: a number in \[0, 1\]"),
        ({"angle": "signd"}, "Did you mean 'signed'"),
        ({"accumulate": (3, 2)}, r"accumulate=\(3, 2\).*nearest: \(2, 3\)"),
        ({"accumulate": (-1,)}, "accumulate holds -1"),
        ({"accumulate": 3}, "accumulate=3"),
        ({"keep": 0.3, "ratios": (0.5,)}, "both set the budget"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises((ParameterError, UnknownNameError), match=message):
        TransPrune(**parameters)


def test_layers_that_do_not_go_together():
    with pytest.raises(ParameterError, match=r"begins at layer 3, .* input of layer 2 already; .*nearest: 1"):
        TransPrune(layers=(2,), ratios=(0.5,), accumulate=(3,)).cut_layers(8)
    with pytest.raises(ParameterError, match="has 2 stages, and layers is not given; allowed: 3 ratios"):
        TransPrune(ratios=(0.5, 0.25)).cut_layers(8)


def test_an_image_that_no_text_follows_is_refused():
    model = DEEP_LLAVA.build(torch.float32)
    refused = pytest.raises(UnsupportedCallError, match="Row 1 ends with an image")
    with torch.no_grad(), vlmprune.pruned(model, TransPrune(keep=0.5)), refused:
        model(**DEEP_LLAVA.inputs([[3, "A", 4], [2, "B"]]))
