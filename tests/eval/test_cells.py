from __future__ import annotations

import pytest

from vlmprune.errors import BudgetError, ParameterError, UnknownNameError, UnsupportedMethodError
from vlmprune.eval.run.cells import BASELINES, Cell, make_cells, parse_keeps, parse_methods, parse_value, usable_cells
from vlmprune.methods.registry import make_method, method_names


def test_methods_and_parameters():
    assert parse_methods("pool, random:seed=3") == [("pool", {}), ("random", {"seed": 3})]


@pytest.mark.parametrize(
    ("text", "error", "message"),
    [
        ("divprun", UnknownNameError, "Did you mean 'divprune'"),
        ("random:sed=3", UnknownNameError, "Did you mean 'seed'"),
        ("random:seed", ParameterError, "name=value"),
        ("random:seed=-1", ParameterError, "seed=-1"),
        (" , ", ParameterError, "names no method"),
    ],
)
def test_bad_methods(text, error, message):
    with pytest.raises(error, match=message):
        parse_methods(text)


def test_keeps():
    assert parse_keeps("0.5, 64,1.0,1,0.5") == [0.5, 64, 1.0, 1]
    assert [type(keep) for keep in parse_keeps("1.0")] == [float]


@pytest.mark.parametrize("text", ["0", "0.0", "1.5", "-3", "nan", "inf", "half", "", "0x10"])
def test_bad_keeps(text):
    with pytest.raises(BudgetError):
        parse_keeps(text)


def test_values():
    assert [
        parse_value(text) for text in ("3", "0.5", "true", "none", "8+16+24", "dot", "1e-3", "-2", "8+", "1e+2")
    ] == [
        *(3, 0.5, True, None, (8, 16, 24), "dot", 1e-3, -2, (8,), 100.0),
    ]


def test_cells_begin_with_the_full_model_and_hold_the_baselines():
    cells = make_cells([("divprune", {}), ("random", {})], [0.5, 0.1], seed=7, baselines=BASELINES)
    labels = [cell.label for cell in cells]
    assert labels[0] == "full"
    assert labels == list(dict.fromkeys(labels))
    assert {cell.method for cell in cells} == {"full", "divprune", "random", "uniform", "pool"}
    assert all(dict(cell.parameters) == {"seed": 7} for cell in cells if cell.method == "random")
    assert {cell.method for cell in make_cells([("divprune", {})], [0.5], 0)} == {"full", "divprune"}


def test_every_method_can_be_named():
    for name in method_names():
        assert parse_methods(name) == [(name, {})]


def test_all_methods():
    assert [name for name, _ in parse_methods("all")] == method_names()
    labels = [cell.label for cell in make_cells(parse_methods("all,fastv:layer=1"), [0.5], 0)]
    expected = ["full"]
    for name in method_names():
        # Those that have a budget of their own are run with that too; one that changes attention takes none.
        method = make_method(name)
        expected += [name] * (method.keep is None)
        expected += [f"{name} keep=0.5"] * (method.site != "attention")
    assert labels == [*expected, "fastv:layer=1 keep=0.5"]


def test_what_the_model_cannot_give_is_left_out_with_the_reason(toy):
    model, methods = toy.model(), parse_methods("all")
    usable, left_out = usable_cells(model, make_cells(methods, [0.9, 0.5, 0.2], 0), methods)
    labels = [cell.label for cell in usable]
    assert {"full", "divprune keep=0.2", "fastv keep=0.9", "pyramiddrop keep=0.5"} <= set(labels)
    notes = {(item.title, item.keep): item for item in left_out}
    assert set(notes) >= {
        *(("globalcom2", None), ("fastv", 0.5), ("fastv", 0.2), ("pyramiddrop", 0.2)),
        *(("cdpruner", None), ("recoverable_compression", None), ("tome", 0.2), ("transprune", 0.2)),
    }
    assert {cell.method for cell in usable} | {item.title for item in left_out} == {"full", *method_names()}
    assert "var" in labels
    assert "text_tower=None" in notes["cdpruner", None].reason
    assert notes["fastv", 0.5].kind == "not reachable"
    assert "fastv keep=0.5: not reachable. " in notes["fastv", 0.5].note
    assert "nearest: keep=0.67" in notes["fastv", 0.5].reason
    assert "nearest: keep=0.34" in notes["pyramiddrop", 0.2].reason
    note = notes["globalcom2", None].note
    assert note.startswith("globalcom2: not served. 'globalcom2' needs images cut in a thumbnail and crops")


def test_methods_whose_default_layer_the_model_does_not_have_are_left_out(toy):
    model, methods = toy.model(), parse_methods("all")
    model.config.text_config.num_hidden_layers = 2
    _, left_out = usable_cells(model, make_cells(methods, [0.9], 0), methods)
    (item,) = [item for item in left_out if item.title == "fastv"]
    assert item.kind == "not served"
    assert "has 2 layers" in item.reason


def test_what_was_asked_for_by_name_and_cannot_be_had_is_an_error(toy):
    model = toy.model()
    for text, keeps, error, message in (
        ("globalcom2,pool", [0.5], UnsupportedMethodError, "thumbnail"),
        ("fastv", [0.5, 0.2], BudgetError, r"keep=0.5.*nearest: keep=0.67"),
    ):
        methods = parse_methods(text)
        with pytest.raises(error, match=message):
            usable_cells(model, make_cells(methods, keeps, 0, BASELINES), methods)


def test_parameters_that_fix_the_budget_make_one_cell():
    methods = parse_methods("pyramiddrop:ratios=0.5+0.25,pyramiddrop")
    labels = [cell.label for cell in make_cells(methods, [0.5, 0.25], 0)]
    assert labels == ["full", "pyramiddrop:ratios=0.5+0.25", "pyramiddrop keep=0.5", "pyramiddrop keep=0.25"]


def test_random_is_repeated_with_other_seeds():
    cells = make_cells([("divprune", {})], [0.5, 8], 7, ["random"], random_seeds=3)
    random = [cell for cell in cells if cell.method == "random"]
    assert [(cell.label, dict(cell.parameters)["seed"]) for cell in random] == [
        *(("random keep=0.5", 7), ("random keep=8", 7), ("random:seed=8 keep=0.5", 8), ("random:seed=8 keep=8", 8)),
        *(("random:seed=9 keep=0.5", 9), ("random:seed=9 keep=8", 9)),
    ]
    assert [cell.repeats for cell in random[::2]] == [None, "random keep=0.5", "random keep=0.5"]
    named = make_cells(parse_methods("random:seed=3,random:seed=4"), [0.5], 7, random_seeds=3)
    assert [cell.label for cell in named] == ["full", "random:seed=3 keep=0.5", "random:seed=4 keep=0.5"]
    assert len({cell.slug for cell in [*cells, *named]}) == len(cells) + 2


def test_file_names_differ():
    cells = [Cell("pool", 0.5), Cell("pool", 1), Cell("pool", 1.0), Cell("a:b", 1), Cell("a", 1, (("b", 1),)), Cell()]
    assert len({cell.slug for cell in cells}) == len(cells)
    assert all("/" not in cell.slug and ":" not in cell.slug for cell in cells)
