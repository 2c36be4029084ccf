"""`vlmprune.options`: another budget for some calls, in this thread only, undone in every case."""

import contextlib
import copy
import threading

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families.llava_next import CASES as LLAVA_NEXT
from support.families.qwen3_vl import QWEN3_VL
from support.matrix import METHOD_PARAMETERS
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import BudgetError, NotAppliedError, ParameterError, UnknownNameError
from vlmprune.methods import DivPrune, FastV, HiRED, PyramidDrop, ToDRE

CASE = LLAVA_CLIP_GQA
DEEP = deeper(LLAVA_CLIP_GQA)
GREEDY = {"max_new_tokens": 4, "do_sample": False}
ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9], [2, "A", 7]]
METHODS = ["divprune", "fastervlm", "pool", "random", "fastv", "pyramiddrop", "todre"]


def kept(model):
    return [[stage.tolist() for _, stage in image.stages] for image in vlmprune.last_run(model).images]


@torch.no_grad()
def answers(model, inputs):
    return model(**inputs).logits, model.generate(**inputs, **GREEDY), kept(model)


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0], atol=2e-5, rtol=1e-4)
    assert torch.equal(first[1], second[1])
    assert first[2] == second[2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("keep", [0.8, 0.45, 1.0])
def test_another_budget_is_as_if_applied_with_it(method, keep):
    model, inputs = DEEP.build(torch.float32), DEEP.inputs(ROWS)
    parameters = METHOD_PARAMETERS[method]
    with vlmprune.pruned(model, method, keep=keep, **parameters):
        expected = answers(model, inputs)
    with vlmprune.pruned(model, method, keep=0.6, **parameters):
        before = answers(model, inputs)
        with vlmprune.options(model, keep=keep) as same:
            assert same is model
            assert_same(answers(model, inputs), expected)
        assert_same(answers(model, inputs), before)
        assert before[2] != expected[2]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("beams", [1, 2])
def test_a_budget_for_each_row(method, beams):
    model, inputs = DEEP.build(torch.float32), DEEP.inputs(ROWS)
    keep, parameters = [0.7, 20, 0.6, 1.0], METHOD_PARAMETERS[method]
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.8, **parameters):
        with vlmprune.options(model, keep=keep):
            together = model(**inputs).logits
            run = vlmprune.last_run(model)
            tokens = model.generate(**inputs, **GREEDY, num_beams=beams)
        for row, (content, budget) in enumerate(zip(ROWS, keep, strict=True)):
            alone = DEEP.inputs([content])
            with vlmprune.options(model, keep=budget):
                logits = model(**alone).logits[0]
                single = vlmprune.last_run(model)
                assert single.visual_tokens_per_layer == [run.visual_tokens_per_layer[row]]
                theirs = [image.kept.tolist() for image in run.images if image.batch_index == row]
                assert [image.kept.tolist() for image in single.images] == theirs
                assert torch.equal(tokens[row, -4:], model.generate(**alone, **GREEDY, num_beams=beams)[0, -4:])
            torch.testing.assert_close(together[row, -len(logits) :], logits, atol=2e-5, rtol=1e-4)


def test_budgets_by_row_on_deep_features():
    case = deeper(QWEN3_VL)
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, [DivPrune(keep=0.9), FastV(layer=1, keep=0.9)]):
        with vlmprune.options(model, keep=[{"divprune": 0.5}, {"fastv": 0.5}, {}, {"divprune": 4, "fastv": 3}]):
            together = model(**inputs).logits
            assert [len(image.kept) for image in vlmprune.last_run(model).images if image.batch_index == 3] == [3]
        with vlmprune.options(model, keep={"divprune": 4, "fastv": 3}):
            logits = model(**case.inputs(ROWS[3:])).logits[0]
        torch.testing.assert_close(together[3, -len(logits) :], logits, atol=2e-5, rtol=1e-4)


def test_blocks_nest_and_are_undone_after_an_exception():
    model, inputs = CASE.build(torch.float32), CASE.inputs([[3, "A", 4]])

    def count():
        with torch.no_grad():
            model(**inputs)
        return len(vlmprune.last_run(model).images[0].kept)

    with vlmprune.pruned(model, "random", keep=10):
        with vlmprune.options(model, keep=20):
            with contextlib.suppress(ZeroDivisionError), vlmprune.options(model, keep=30):
                assert count() == 30
                raise ZeroDivisionError
            with vlmprune.options(model):
                assert count() == 20
        assert count() == 10


def test_threads_have_their_own_budgets():
    model, inputs = CASE.build(torch.float32), CASE.inputs([[3, "A", 4]])
    counts, barrier = {}, threading.Barrier(4)

    def serve(keep):
        with torch.no_grad(), vlmprune.options(model, keep=keep):
            for _ in range(3):
                barrier.wait()
                cache = model(**inputs, use_cache=True).past_key_values
                counts.setdefault(keep, set()).add(cache.layers[0].keys.shape[-2] - 7)

    with vlmprune.pruned(model, "divprune", keep=9), vlmprune.options(model, keep=17):
        threads = [threading.Thread(target=serve, args=(keep,)) for keep in (2, 5, 8, 11)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        inherited = []
        thread = threading.Thread(
            target=lambda: inherited.append(model(**inputs).past_key_values.layers[0].keys.shape[-2])
        )
        thread.start()
        thread.join()
    assert counts == {2: {2}, 5: {5}, 8: {8}, 11: {11}}
    assert inherited == [16]


def test_decoding_goes_on_after_the_block():
    model, inputs = DEEP.build(torch.float32), DEEP.inputs([[3, "A", 4]])
    with torch.no_grad(), vlmprune.pruned(model, "pyramiddrop", keep=0.7):
        with vlmprune.options(model, keep=0.4):
            expected = model.generate(**inputs, **GREEDY)
            first = model.generate(**inputs, max_new_tokens=1, do_sample=False, return_dict_in_generate=True)
        ids = first.sequences
        rest = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            past_key_values=first.past_key_values,
            max_new_tokens=3,
            do_sample=False,
        )
    assert torch.equal(rest, expected)


def test_copies_have_their_own_options():
    model, inputs = CASE.build(torch.float32), CASE.inputs([[3, "A", 4]])
    with torch.no_grad(), vlmprune.pruned(model, "random", keep=10):
        with vlmprune.options(model, keep=20):
            other = copy.deepcopy(model)
            other(**inputs)
            assert len(vlmprune.last_run(other).images[0].kept) == 10
        with vlmprune.options(other, keep=5):
            model(**inputs)
            assert len(vlmprune.last_run(model).images[0].kept) == 10


def test_hooks_that_a_budget_needs_are_removed_with_the_rest():
    model = DEEP.build(torch.float32)

    def hooks():
        return [len(module._forward_pre_hooks) + len(module._forward_hooks) for module in model.modules()]

    before = hooks()
    with vlmprune.pruned(model, "pyramiddrop", keep=0.9), vlmprune.options(model, keep=0.3):
        pass
    with vlmprune.pruned(model, ToDRE(keep=1.0, layer=3)), vlmprune.options(model, keep=0.3):
        pass
    assert hooks() == before


@pytest.mark.parametrize(
    ("method", "keep", "error", "message"),
    [
        ("random", 0, BudgetError, "keep=0 keeps no visual token"),
        ("random", [], BudgetError, "one entry for each row"),
        ("random", [0.5, 1.5], BudgetError, "share above 1"),
        (FastV(layer=1, ratio=0.5), 0.5, ParameterError, "both set the budget"),
        (FastV(layer=3), 0.1, BudgetError, "nearest: keep=0.51"),
        ([DivPrune(), PyramidDrop(keep=0.5)], 0.5, ParameterError, "say which is meant"),
        ([DivPrune(), PyramidDrop(keep=0.5)], {"divprun": 0.5}, UnknownNameError, "Did you mean 'divprune'"),
    ],
    ids=str,
)
def test_bad_budgets(method, keep, error, message):
    model = DEEP.build(torch.float32)
    given = {"keep": 0.9} if isinstance(method, FastV) and method.ratio is None else {}
    method = FastV(layer=method.layer, **given) if given else method
    with vlmprune.pruned(model, method), pytest.raises(error, match=message), vlmprune.options(model, keep=keep):
        pass


def test_rows_that_do_not_fit_and_models_without_a_method():
    model, inputs = CASE.build(torch.float32), CASE.inputs([[3, "A", 4]] * 3)
    with pytest.raises(NotAppliedError), vlmprune.options(model, keep=0.5):
        pass
    with (
        vlmprune.pruned(model, "random"),
        vlmprune.options(model, keep=[0.5, 0.5]),
        pytest.raises(BudgetError, match="2 entries for a batch of 3 rows"),
    ):
        model(**inputs)


def test_faithful_methods_have_one_budget():
    model = LLAVA_NEXT[0].build(torch.float32)
    with (
        vlmprune.pruned(model, HiRED(keep=0.3, faithful=True)),
        pytest.raises(ParameterError, match="faithful"),
        vlmprune.options(model, keep=[0.5, 0.25]),
    ):
        pass
