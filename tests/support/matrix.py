"""The (method x family) matrix that drives the contract tests; a new method is one line here."""

from __future__ import annotations

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.family_cases import FAMILY_CASES
from support.tiny_models import FamilyCase

# Every method by name, with parameters that make it work hard on the tiny models.
METHOD_PARAMETERS: dict[str, dict[str, object]] = {
    "random": {"seed": 3},
    "uniform": {},
    "pool": {},
    "fastervlm": {},
    "vtc_cls": {},
    "hired": {},
    "globalcom2": {},
    "divprune": {},
    "todre": {"tau": 1.0, "layer": 3},
    "hiprune": {"alpha": 0.5},
    "holov": {"beta": 1.0},
    "textmonkey": {},
    "vispruner": {},
    "fastv": {"layer": 1},
    "pyramiddrop": {},
}

# They drop tokens between layers, so they get the deeper variant of every family.
LAYER_METHODS = frozenset({"todre", "fastv", "pyramiddrop"})

# They score by the last prompt token: the same image is cut otherwise once more text follows it.
FOLLOW_THE_QUESTION = frozenset({"fastv", "pyramiddrop"})


def few_tokens(method: str, family: FamilyCase) -> int:
    """Return a small number of tokens per image that the method can reach on average over the layers of the tiny model."""
    return 5 if method not in FOLLOW_THE_QUESTION else max(map(family.tokens, ("A", "large"))) // 3


def _cases() -> list[object]:
    cases = []
    for family in FAMILY_CASES:
        served = vlmprune.list_methods(family.build(torch.float32))
        for name in METHOD_PARAMETERS:
            if name in served:
                case = deeper(family) if name in LAYER_METHODS else family
                cases.append(pytest.param(name, case, id=f"{name}-{family}"))
    return cases


MATRIX = _cases()
over_matrix = pytest.mark.parametrize(("method", "family"), MATRIX)
