"""Where and how much is dropped: ratios, the average over layers, and what cannot be done."""

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA

import vlmprune
from vlmprune.errors import BudgetError, ParameterError, UnknownNameError, UnsupportedMethodError
from vlmprune.methods import DivPrune, FastV, PyramidDrop, ToDRE, ToDRERelevance
from vlmprune.methods.layer.fastv import fastv_count
from vlmprune.methods.layer.pyramiddrop import even_layers, solve_schedule


def average(schedule, total, layers):
    alive = [total] * layers
    for cut in schedule:
        alive[cut.layer :] = [cut.tokens] * (layers - cut.layer)
    return sum(alive) / layers


def test_paper_schedule():
    method = PyramidDrop(ratios=(0.5, 0.25, 0.125))
    assert method.cut_layers(32) == (8, 16, 24)
    assert [tuple(cut) for cut in method.schedule(576, 32)] == [(8, 288), (16, 144), (24, 72)]
    assert average(method.schedule(576, 32), 576, 32) == 270
    assert average(method.schedule(2880, 32), 2880, 32) == 1350
    assert [cut.tokens for cut in method.schedule(577, 32)] == [288, 144, 72]


def test_keep_of_the_paper_schedule_gives_its_ratios():
    assert PyramidDrop(keep=270 / 576).schedule(576, 32) == PyramidDrop(ratios=(0.5, 0.25, 0.125)).schedule(576, 32)
    assert even_layers(28, 3) == (7, 14, 21)


def test_small_budgets_cut_early():
    cuts, shares = solve_schedule(128 / 576, 32)
    assert cuts == (2, 10, 20)
    assert shares[0] == 2 * shares[1] == 4 * shares[2]
    assert abs(shares[0] - 0.32) < 0.003


@pytest.mark.parametrize("layers", [2, 3, 6, 8, 24, 28, 32, 40])
@pytest.mark.parametrize("keep", [0.07, 0.11, 0.2, 0.25, 0.34, 0.5, 0.75, 0.95])
@pytest.mark.parametrize("total", [576, 2880, 1201])
def test_keep_is_the_average_over_layers(layers, keep, total):
    method = PyramidDrop(keep=keep)
    if keep <= 1 / layers:
        with pytest.raises(BudgetError, match="nearest: keep=") as caught:
            method.schedule(total, layers)
        nearest = float(str(caught.value).rsplit("keep=", 1)[1].rstrip("."))
        assert nearest > keep
        assert PyramidDrop(keep=nearest).schedule(total, layers)
        return
    schedule = method.schedule(total, layers)
    counts = [cut.tokens for cut in schedule]
    assert counts == sorted(counts, reverse=True)
    assert min(counts) >= 1
    assert set(cut.layer for cut in schedule) <= set(method.cut_layers(layers))
    assert average(schedule, total, layers) == pytest.approx(keep * total, abs=1)


def test_keep_as_a_count_is_the_average_per_image():
    for total in (200, 576, 2880, 4000):
        assert average(PyramidDrop(keep=150).schedule(total, 32), total, 32) == pytest.approx(150, abs=1)
    assert PyramidDrop(keep=150).schedule(150, 32) == ()
    with pytest.raises(BudgetError, match="nearest: keep=19"):
        PyramidDrop(keep=18).schedule(576, 32)
    assert PyramidDrop(keep=19).schedule(576, 32)


def test_keep_with_given_layers():
    method = PyramidDrop(layers=(4, 8), keep=0.5)
    assert [cut.layer for cut in method.schedule(576, 16)] == [4, 8]
    assert average(method.schedule(576, 16), 576, 16) == pytest.approx(288, abs=1)
    with pytest.raises(BudgetError, match=r"first 4 layers.*nearest: keep=0.26"):
        PyramidDrop(layers=(4, 8), keep=0.25).cut_layers(16)


def test_fastv():
    assert FastV(ratio=0.5).schedule(577, 32) == ((2, 288),)
    assert FastV(ratio=0.75, layer=3).schedule(576, 32) == ((3, 144),)
    assert FastV(ratio=0.71, rounding="floor").schedule(333, 32) == ((2, 96),)
    # 1 - 0.9 is a little less than 0.1: lmms-eval's form is int(N * 0.1).
    assert FastV(ratio=0.9, rounding="floor").schedule(10, 32) == ((2, 1),)
    for percent in range(1, 100):
        keep = percent / 100
        assert fastv_count(576, 1 - keep, "floor") == int(576 * keep)
        assert fastv_count(2880, 1 - keep, "floor") == int(2880 * keep)
    assert FastV(keep=0.5, layer=2, rounding="floor").schedule(9, 8) == ((2, 3),)
    assert FastV(keep=0.5, layer=2).schedule(11, 8) == ((2, 4),)
    assert FastV(keep=0.5, layer=2, rounding="floor").schedule(11, 8) == ((2, 3),)
    assert average(FastV(keep=0.3).schedule(576, 32), 576, 32) == pytest.approx(0.3 * 576, abs=1)
    assert average(FastV(keep=100).schedule(576, 32), 576, 32) == pytest.approx(100, abs=1)
    with pytest.raises(BudgetError, match=r"first 2 layers; nearest: keep=0.07"):
        FastV(keep=0.05).cut_layers(32)
    with pytest.raises(BudgetError, match="nearest: keep=37"):
        FastV(keep=30).schedule(576, 32)


def test_todre_relevance_layer():
    assert [ToDRERelevance().cut_layers(layers) for layers in (32, 28, 40, 2)] == [(28,), (24,), (35,), (1,)]


@pytest.mark.parametrize(
    ("method", "arguments", "error", "message"),
    [
        (
            PyramidDrop,
            {"layers": (4, 2), "ratios": (0.5, 0.2)},
            ParameterError,
            r"follows the one at layer 4.*nearest: \(2, 4\)",
        ),
        (PyramidDrop, {"layers": (0, 2)}, ParameterError, "layers holds 0"),
        (PyramidDrop, {"layers": 3}, ParameterError, "layers=3"),
        (PyramidDrop, {"ratios": (0.2, 0.5)}, ParameterError, r"0.5 follows 0.2.*nearest: \(0.5, 0.2\)"),
        (PyramidDrop, {"ratios": (1.5,)}, ParameterError, r"ratios\[0\]=1.5"),
        (PyramidDrop, {"ratios": (0.5,), "layers": (2, 4)}, ParameterError, "2 stages, ratios"),
        (PyramidDrop, {"ratios": (0.5,), "keep": 0.3}, ParameterError, "both set the budget"),
        (PyramidDrop, {"keep": 0.0}, BudgetError, "keeps no visual token"),
        (FastV, {"layer": 0}, ParameterError, "layer holds 0"),
        (FastV, {"ratio": 1.0}, ParameterError, "ratio=1.0"),
        (FastV, {"ratio": 0.5, "keep": 0.3}, ParameterError, "both set the budget"),
        (FastV, {"rounding": "flor"}, UnknownNameError, "floor"),
        (ToDRERelevance, {"tau": 2}, ParameterError, "tau=2"),
        (ToDRERelevance, {"keep": 0.5}, ParameterError, "leave keep unset"),
    ],
)
def test_bad_parameters(method, arguments, error, message):
    with pytest.raises(error, match=message):
        method(**arguments)


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (PyramidDrop(layers=(2, 8), ratios=(0.5, 0.2)), ParameterError, "holds 8, but .* has 8 layers.*nearest: 7"),
        (FastV(layer=9, ratio=0.5), ParameterError, "allowed: 1 to 7"),
        (ToDRE(layer=12), ParameterError, "nearest: 7"),
        (FastV(keep=0.2), BudgetError, "nearest: keep=0.26"),
        (PyramidDrop(keep=0.1), BudgetError, "nearest: keep=0.13"),
        ([DivPrune(), "random"], UnsupportedMethodError, "'random' and 'divprune' both act at the input site"),
        ([FastV(), PyramidDrop()], UnsupportedMethodError, "both act at the layer site"),
        ([ToDRE(), FastV()], UnsupportedMethodError, "both act at the layer site"),
        ([], UnsupportedMethodError, "one per site"),
    ],
)
def test_what_a_model_cannot_run_leaves_it_alone(method, error, message):
    model = DEEP_LLAVA.build(torch.float32)
    before = [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()]
    with pytest.raises(error, match=message):
        vlmprune.apply(model, method)
    assert "_vlmprune" not in model.__dict__
    assert [(dict(module._forward_hooks), dict(module._forward_pre_hooks)) for module in model.modules()] == before


def test_parameters_beside_a_list_are_refused():
    with pytest.raises(ParameterError, match="set it on each"):
        vlmprune.apply(DEEP_LLAVA.build(torch.float32), [DivPrune(), PyramidDrop()], keep=0.5)


def test_a_budget_that_rounds_to_zero_is_an_error_and_the_model_goes_on():
    model, inputs = DEEP_LLAVA.build(torch.float32), DEEP_LLAVA.inputs([[3, "A", 4]])
    with torch.no_grad(), vlmprune.pruned(model, PyramidDrop(layers=(2, 4), ratios=(0.5, 0.02))):
        with pytest.raises(BudgetError, match=r"ratio 0.02 at layer 4 keeps int\(36 \* 0.02\) = 0 of an image's 36"):
            model(**inputs)
        assert model(**DEEP_LLAVA.inputs([[5]])).logits.isfinite().all()
    with torch.no_grad(), vlmprune.pruned(model, PyramidDrop(layers=(2, 4), ratios=(0.5, 0.02), allow_empty=True)):
        assert model(**inputs).logits.isfinite().all()
        assert vlmprune.last_run(model).visual_tokens_per_layer == [[36, 36, 18, 18, 0, 0, 0, 0]]
        assert model.generate(**inputs, max_new_tokens=3).shape[1] == 46


@pytest.mark.parametrize("total", [3, 7, 36, 576, 577, 2880, 3001, 7777])
def test_what_the_errors_name_instead_of_zero_tokens_is_enough(total):
    for rounding in ("round", "floor"):
        with pytest.raises(BudgetError, match="keeps none of") as caught:
            FastV(ratio=1 - 0.1 / total, rounding=rounding).schedule(total, 8)
        ratio = float(str(caught.value).rsplit("ratio=", 1)[1].rstrip("."))
        assert 1 <= FastV(ratio=ratio, rounding=rounding).schedule(total, 8)[0].tokens <= 2
    with pytest.raises(BudgetError, match="at least") as caught:
        PyramidDrop(layers=(2,), ratios=(0.5 / total,)).schedule(total, 8)
    ratio = float(str(caught.value).split("at least ")[1].split(" ")[0])
    assert PyramidDrop(layers=(2,), ratios=(ratio,)).schedule(total, 8)[0].tokens >= 1


def test_one_image_of_a_batch_or_of_a_pipeline_without_tokens_is_named():
    from support.deeper import deeper
    from support.families.qwen2_vl import QWEN2_VL

    case = deeper(QWEN2_VL)
    model, inputs = case.build(torch.float32), case.inputs([[3, "large", 4], [2, "small", 1]])
    for method, message in (
        (
            PyramidDrop(layers=(2, 4), ratios=(0.5, 0.04)),
            r"ratio 0.04 at layer 4 keeps int\(16 \* 0.04\) = 0 of an image's 16",
        ),
        (
            FastV(ratio=0.98, rounding="floor"),
            r"ratio=0.98 keeps none of an image's 48 visual tokens; nearest: ratio=0.9791",
        ),
        (
            [DivPrune(keep=4), PyramidDrop(layers=(3,), ratios=(0.2,))],
            r"ratio 0.2 at layer 3 keeps int\(4 \* 0.2\) = 0",
        ),
    ):
        with torch.no_grad(), vlmprune.pruned(model, method):
            with pytest.raises(BudgetError, match=message):
                model(**inputs)
            assert model(**case.inputs([[5], [3]])).logits.isfinite().all()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"layer_types": ["full_attention"] * 4 + ["sliding_attention"] * 4, "sliding_window": 8},
            "layer 4.*sliding_attention",
        ),
        ({"layer_types": None, "sliding_window": 8}, "with a window; allowed: full attention"),
    ],
    ids=["some-layers", "all-layers"],
)
def test_windows_of_attention_are_refused(monkeypatch, changes, message):
    model = DEEP_LLAVA.build(torch.float32)
    for name, value in changes.items():
        monkeypatch.setattr(model.model.language_model.config, name, value, raising=False)
    with pytest.raises(UnsupportedMethodError, match=message):
        vlmprune.apply(model, PyramidDrop(keep=0.5))


def test_soft_capped_logits_are_refused(monkeypatch):
    model = DEEP_LLAVA.build(torch.float32)
    attention = model.model.language_model.layers[5].self_attn
    monkeypatch.setattr(attention, "attn_logit_softcapping", 30.0, raising=False)
    with pytest.raises(UnsupportedMethodError, match=r"layer 5.*soft-capped"):
        vlmprune.apply(model, PyramidDrop(keep=0.5))


def test_names_and_repr():
    model = DEEP_LLAVA.build(torch.float32)
    assert {"pyramiddrop", "fastv", "todre"} <= set(vlmprune.list_methods(model))
    with vlmprune.pruned(model, [DivPrune(keep=0.5), PyramidDrop(keep=0.4)]), torch.no_grad():
        model(**DEEP_LLAVA.inputs([[3, "A", 4]]))
        run = vlmprune.last_run(model)
    assert run.method == "divprune+pyramiddrop"
    assert run.visual_tokens_per_layer[0][0] == 18
    assert sum(run.visual_tokens_per_layer[0]) / 8 == pytest.approx(0.4 * 18, abs=1)
