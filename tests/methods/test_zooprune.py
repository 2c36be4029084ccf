"""Sensitivity of projectors of every kind, against differences of the module itself."""

import pytest
import torch
from torch import nn

from support.family_cases import FAMILY_CASES
from vlmprune.errors import ParameterError
from vlmprune.methods import ZOOPrune
from vlmprune.methods.input import zooprune_sensitivity
from vlmprune.methods.input.zooprune import random_rows
from vlmprune.methods.input.zooprune_sensitivity import sensitivity
from vlmprune.patches.families.registry import find_family

# One of every kind of projector.
KINDS = {type(find_family(case.build(torch.float32)).projector): case for case in FAMILY_CASES}


@pytest.mark.parametrize("case", KINDS.values(), ids=[kind.__name__ for kind in KINDS])
@pytest.mark.parametrize("h", [0.0, 0.01, 1.0])
def test_equals_differences_of_the_module(case, h, monkeypatch):
    monkeypatch.setattr(zooprune_sensitivity, "CHUNK_ELEMENTS", 2000)
    family = find_family(case.build(torch.float64))
    projector = family.projector_layers()
    dim = projector.first.shape[1] // projector.patches
    directions, _ = random_rows(7, dim, None, 1, 3)
    features = torch.randn(9, projector.patches * dim, generator=torch.Generator().manual_seed(1)) + 0.5
    # The norm of Qwen computes in fp32 whatever it is given, so the step cannot be tiny.
    step, lengths = h or 1e-3, []
    with torch.no_grad():
        for direction in directions.double():
            move = step * direction.repeat(projector.patches)
            ends = [family.project(features.double() + sign * move) for sign in (1, -1)]
            lengths.append(((ends[0] - ends[1]) / (2 * step)).norm(dim=-1))
        found = sensitivity(features, projector, directions, h)
    tolerance = 1e-3 if h < 1 else 1e-4
    torch.testing.assert_close(found, torch.stack(lengths).mean(0).float(), rtol=tolerance, atol=tolerance)


def test_both_orders_of_the_product_give_the_same(monkeypatch):
    """With fewer rows than tokens the second layer is scaled along each direction, else every token's change is."""
    layers = find_family(FAMILY_CASES[0].build(torch.float32)).projector_layers()
    directions, sketch = random_rows(9, 32, 12, 32, 0)
    features = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(zooprune_sensitivity, "CHUNK_ELEMENTS", 1000)
    with torch.no_grad():
        together = sensitivity(features, layers, directions, 0.0, sketch)
        few = torch.cat([sensitivity(some, layers, directions, 0.0, sketch) for some in features.split(10)])
    torch.testing.assert_close(together, few)


def test_projections_estimate_the_lengths():
    layers = find_family(FAMILY_CASES[0].build(torch.float32)).projector_layers()
    directions, sketch = random_rows(64, 32, 400, 32, 0)
    features = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = sensitivity(features, layers, directions, 0.0)
        estimated = sensitivity(features, layers, directions, 0.0, sketch)
    assert ((estimated / whole - 1).abs() < 0.1).all()


def test_a_projector_of_another_kind_is_refused():
    family = find_family(FAMILY_CASES[0].build(torch.float32))
    activation = family.projector.act
    try:
        family.projector.act = nn.Sequential(nn.Linear(32, 32), nn.GELU())
        assert not family.has_projector_layers
    finally:
        family.projector.act = activation
    assert family.has_projector_layers


@pytest.mark.parametrize(("name", "value"), [("m", 0), ("h", -0.1), ("sketch", 0), ("seed", -1), ("h", float("nan"))])
def test_bad_parameters_are_refused(name, value):
    with pytest.raises(ParameterError, match=name):
        ZOOPrune(**{name: value})
