"""Sensitivity of projectors of every kind, against differences of the module itself."""

import pytest
import torch
from torch import nn

from support.family_cases import FAMILY_CASES
from support.matrix import serves
from vlmprune.errors import ParameterError
from vlmprune.methods import ZOOPrune
from vlmprune.methods.input import zooprune_sensitivity
from vlmprune.methods.input.zooprune import random_directions, random_sketches
from vlmprune.methods.input.zooprune_sensitivity import sensitivity
from vlmprune.methods.projector import ProjectorLayers
from vlmprune.patches.families.registry import find_family

# One of every kind of projector that the method can be served with.
KINDS = {
    type(find_family(case.build(torch.float32)).projector): case for case in FAMILY_CASES if serves("zooprune", case)
}


@pytest.mark.parametrize("case", KINDS.values(), ids=[kind.__name__ for kind in KINDS])
@pytest.mark.parametrize("h", [0.0, 0.01, 1.0])
def test_equals_differences_of_the_module(case, h, monkeypatch):
    monkeypatch.setattr(zooprune_sensitivity, "CHUNK_ELEMENTS", 2000)
    family = find_family(case.build(torch.float64))
    projector = family.projector_layers()
    dim = projector.first.shape[1] // projector.patches
    directions = random_directions(7, dim, 3)
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
    directions, sketch = random_directions(10, 32, 0), random_sketches(3, 12, 32, 0)
    features = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(zooprune_sensitivity, "CHUNK_ELEMENTS", 1000)
    with torch.no_grad():
        together = sensitivity(features, layers, directions, 0.0, sketch)
        few = torch.cat([sensitivity(some, layers, directions, 0.0, sketch) for some in features.split(10)])
    torch.testing.assert_close(together, few)


def test_projections_estimate_the_lengths():
    layers = find_family(FAMILY_CASES[0].build(torch.float32)).projector_layers()
    directions, sketch = random_directions(64, 32, 0), random_sketches(4, 400, 32, 0)
    features = torch.randn(40, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        whole = sensitivity(features, layers, directions, 0.0)
        estimated = sensitivity(features, layers, directions, 0.0, sketch)
    assert ((estimated / whole - 1).abs() < 0.1).all()


def test_sets_of_projections_take_turns():
    layers = find_family(FAMILY_CASES[0].build(torch.float32)).projector_layers()
    directions, sketch = random_directions(5, 32, 0), random_sketches(2, 3, 32, 0)
    features = torch.randn(6, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        parts = [
            sensitivity(features, layers, directions[number : number + 1], 0.0, sketch[number % 2][None])
            for number in range(5)
        ]
        found = sensitivity(features, layers, directions, 0.0, sketch)
    torch.testing.assert_close(found, torch.stack(parts).mean(0))


def test_default_projections_order_tokens_as_the_whole_output_does():
    """In half precision too, where the projector's own values are taken."""
    generator = torch.Generator().manual_seed(0)
    first, second = (torch.randn(256, 128, generator=generator) / 11, torch.randn(128, 256, generator=generator) / 16)
    features = 2 * torch.randn(200, 128, generator=generator) * torch.rand(200, 1, generator=generator)
    method, ranks = ZOOPrune(), []
    directions = random_directions(method.m, 128, 0)
    for dtype, sketch in (
        (torch.float32, None),
        (torch.bfloat16, random_sketches(method.sketches, method.sketch, 128, 0)),
    ):
        layers = ProjectorLayers(
            first.to(dtype), torch.zeros(256, dtype=dtype), torch.nn.functional.gelu, second.to(dtype)
        )
        ranks.append(sensitivity(features, layers, directions, 0.0, sketch).argsort().argsort().float())
    assert torch.corrcoef(torch.stack(ranks))[0, 1] > 0.9


def test_a_projector_of_another_kind_is_refused():
    family = find_family(FAMILY_CASES[0].build(torch.float32))
    activation = family.projector.act
    try:
        family.projector.act = nn.Sequential(nn.Linear(32, 32), nn.GELU())
        assert not family.has_projector_layers
    finally:
        family.projector.act = activation
    assert family.has_projector_layers


@pytest.mark.parametrize(
    ("name", "value"), [("m", 0), ("h", -0.1), ("sketch", 0), ("sketches", 0), ("seed", -1), ("h", float("nan"))]
)
def test_bad_parameters_are_refused(name, value):
    with pytest.raises(ParameterError, match=name):
        ZOOPrune(**{name: value})
