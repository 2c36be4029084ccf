"""The (method x family) matrix that drives the contract tests; a new method or family is one line here."""

from __future__ import annotations

import pytest

import vlmprune
from support.tiny_models import FAMILY_CASES

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
    "todre": {"relevance": False},
}


def _cases() -> list[object]:
    cases = []
    for family in FAMILY_CASES:
        served = vlmprune.list_methods(family.build(_float32()))
        cases += [pytest.param(name, family, id=f"{name}-{family}") for name in METHOD_PARAMETERS if name in served]
    return cases


def _float32() -> object:
    import torch

    return torch.float32


MATRIX = _cases()
over_matrix = pytest.mark.parametrize(("method", "family"), MATRIX)
