"""What methods say of themselves: the paper's symbols, positions, and the row of the README."""

import inspect
import re
from pathlib import Path

import pytest
import torch

import vlmprune
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnknownNameError
from vlmprune.methods import DivPrune, FastV, PyramidDrop, ToDRERelevance
from vlmprune.methods.needs import CLS_TOKEN, GRID, INSTRUCTION, TILES, VIDEOS, WHOLE_TILES, ordered
from vlmprune.methods.registry import METHODS, make_method

CLASSES = [*METHODS.values(), ToDRERelevance]
PARAMETER = re.compile(r"^(\w+)(=| as an int)")


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.name)
def test_symbols_lead_to_parameters(cls):
    parameters = set(inspect.signature(cls.__init__).parameters) - {"self"}
    for symbol, here in cls.symbols.items():
        assert symbol not in parameters
        spelt = PARAMETER.match(here)
        assert spelt is None or spelt.group(1) in parameters, f"{symbol}: {here}"
        is_argument = len(symbol) > 3 and symbol != "lambda"
        assert is_argument or re.search(rf"\b{symbol}\b", cls.__doc__), f"{symbol} of the paper is not in the docstring"


@pytest.mark.parametrize(
    ("cls", "symbol", "here"),
    [
        (FastV, "K", "layer=K"),
        (FastV, "R", "ratio=R"),
        (PyramidDrop, "lambda", r"ratios=\(lambda, lambda\*\*2, \.\.\.\)"),
        (DivPrune, "K", "keep as an int"),
    ],
)
def test_a_symbol_of_the_paper_is_answered_with_its_name_here(cls, symbol, here):
    words = rf"of {cls.name} '{symbol}': what its paper or code calls {symbol} is {here}"
    with pytest.raises(UnknownNameError, match=words):
        cls(**{symbol: 2})
    with pytest.raises(UnknownNameError, match=words):
        make_method(cls.name, **{symbol: 2})
    model = LLAVA_CLIP_GQA.build(torch.float32)
    with pytest.raises(UnknownNameError, match=words):
        vlmprune.apply(model, cls.name, **{symbol: 2})
    assert not model.model._forward_pre_hooks


def test_a_parameter_that_there_is_not_is_answered_with_the_nearest():
    with pytest.raises(UnknownNameError, match="Did you mean 'ratio'"):
        FastV(ration=0.5)


@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.name)
def test_methods_inside_the_language_model_tell_their_positions_and_the_papers_defaults(cls):
    if cls.site == "layer":
        assert "Positions: " in cls.__doc__
        assert re.search(r"[Tt]he (paper's setting|defaults are the paper's)", cls.__doc__)


@pytest.mark.parametrize("name", METHODS)
def test_the_readme_says_where_a_method_acts_and_what_it_needs(name):
    readme = (Path(__file__).parents[2] / "README.md").read_text()
    (row,) = re.findall(rf"^\| `{name}` \|.*https?.*$|^\| `{name}` \|.*baseline \|$", readme, flags=re.M)
    where, needs = (cell.strip() for cell in row.split("|")[3:5])
    method = make_method(name)
    assert where == ", ".join(part.site for part in method.parts())
    told = [
        need.name.replace("_", " ")
        for need in ordered(method.needs)
        if need in {VIDEOS, CLS_TOKEN, GRID, TILES, WHOLE_TILES, INSTRUCTION}
    ]
    assert needs.replace("–", "") == ", ".join(told)  # noqa: RUF001
