"""What holds of every reduction in a tower, whatever the method: groups, sizes, and tokens that stand alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.encoder_method import BlockBatch, EncoderMethod
from vlmprune.methods.registry import METHODS, make_method
from vlmprune.patches.encoder.reduced_tokens import ReducedTokens

SIDE, DIM, HEADS, TILES = 6, 16, 2, 2
# In "mustdrop" the tokens decide how many go, and not the plan.
NAMES = [name for name, cls in METHODS.items() if issubclass(cls, EncoderMethod) and name != "mustdrop"]
KEEPS_SIZES = ("tome", "crossget", "mctf")


def batch_of(method, tower, seed):
    """The first block in which the method removes something, and its random tokens."""
    plan = method.plan_of_grid((SIDE, SIDE), tower)
    before = SIDE * SIDE
    block = next(number for number, count in enumerate(plan) if count < before)
    generator = torch.Generator().manual_seed(seed)
    tokens = before + tower.has_cls
    hidden = torch.randn(TILES, tokens, DIM, generator=generator)
    added = method.append(hidden, tower)
    hidden = hidden if added is None else torch.cat([hidden, added], 1)
    trailing = method.trailing(tower)
    key, query = (torch.randn(TILES, tokens + trailing, HEADS, DIM // HEADS, generator=generator) for _ in range(2))
    return BlockBatch(
        block=block,
        hidden=hidden,
        remove=before - plan[block],
        tower=tower,
        leading=int(tower.has_cls),
        trailing=trailing,
        grid=(SIDE, SIDE),
        positions=torch.arange(tokens + trailing).expand(TILES, -1),
        key=key,
        query=query,
        scale=(DIM // HEADS) ** -0.5,
    )


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 10_000), keep=st.sampled_from([0.7, 0.6, 0.5]), cls=st.booleans())
def test_every_reduction(name, seed, keep, cls):
    tower = TowerFacts(layers=7, feature_layer=5, has_cls=cls, heads=HEADS)
    method = make_method(name, keep)
    batch = batch_of(method, tower, seed)
    tokens, outputs = batch.hidden.shape[1], batch.hidden.shape[1] - batch.remove
    reduction = method.reduce(batch)
    assert reduction.values.shape == (TILES, outputs, DIM)
    assert reduction.groups.shape == (TILES, tokens)
    lowest = -1 if method.drops else 0
    assert lowest <= int(reduction.groups.min())
    assert int(reduction.groups.max()) < outputs
    # Each output takes the place of a token of its own, one that went into it.
    assert all(len(set(row)) == outputs for row in reduction.targets.tolist())
    if reduction.restore is None:
        own = reduction.groups.gather(1, reduction.targets)
        assert torch.equal(own, torch.arange(outputs).expand(TILES, -1))
    if name in KEEPS_SIZES:
        assert reduction.sizes is not None
    if reduction.sizes is not None:
        torch.testing.assert_close(reduction.sizes.sum(1), torch.full((TILES,), float(tokens)))
        if reduction.restore is None and not method.drops:
            counted = torch.zeros(TILES, outputs).scatter_add_(1, reduction.groups, torch.ones(TILES, tokens))
            torch.testing.assert_close(reduction.sizes, counted)
    reduced = ReducedTokens(batch.hidden, batch.trailing)
    reduced.reduce(batch.hidden, reduction, method.drops)
    restored = reduced.restored(reduction.values)
    whole = batch.hidden[:, : tokens - batch.trailing]
    assert restored.shape == whole.shape
    if reduction.restore is None:
        members = torch.zeros(TILES, outputs).scatter_add_(
            1, reduction.groups.clamp(min=0), (reduction.groups >= 0).float()
        )
        alone = (members.gather(1, reduction.groups.clamp(min=0)) == 1) | (reduction.groups < 0)
        alone = alone[:, : whole.shape[1]]
        assert bool(alone.any())
        torch.testing.assert_close(restored[alone], whole[alone], atol=1e-6, rtol=1e-6)
