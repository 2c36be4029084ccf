"""DivPrune on features that are hard to compare."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from support import method_batches as build
from vlmprune.methods import DivPrune
from vlmprune.methods.input.divprune import divprune_order


def batch_of(features, keep, rows, columns):
    method = DivPrune(keep=keep)
    return method, build.make_batch(method, [build.raster_layout(rows, columns)], features)


@settings(max_examples=40, deadline=None)
@given(distinct=st.integers(1, 6), seed=st.integers(0, 99), keep=st.integers(1, 24))
def test_every_distinct_token_comes_before_a_copy(distinct, seed, keep):
    generator = torch.Generator().manual_seed(seed)
    basis = torch.eye(8)[:distinct]
    copies = torch.cat([torch.arange(distinct), torch.randint(distinct, (24 - distinct,), generator=generator)])
    features = basis[copies]
    method, batch = batch_of(features, keep, 4, 6)
    kept = method.select(batch).kept
    assert len(kept.unique()) == keep
    assert len(features[kept].unique(dim=0)) == min(keep, distinct)


@pytest.mark.parametrize("scale", [1e-20, 1.0, 1e15])
def test_the_length_of_tokens_does_not_matter(scale):
    features = torch.randn(24, 8, generator=torch.Generator().manual_seed(0))
    plain = batch_of(features, 9, 4, 6)
    scaled = batch_of(features * scale, 9, 4, 6)
    assert torch.equal(plain[0].select(plain[1]).kept, scaled[0].select(scaled[1]).kept)


def test_zero_rows_and_equal_features_give_the_full_count():
    for features in (torch.zeros(24, 8), torch.ones(24, 8)):
        method, batch = batch_of(features, 7, 4, 6)
        build.check_selection(method.select(batch), batch)


def test_the_first_pick_is_the_most_isolated_token():
    features = torch.tensor([[1.0, 0.0], [1.0, 0.1], [0.0, 1.0], [1.0, 0.2]])
    _, batch = batch_of(features, 2, 2, 2)
    assert divprune_order(batch)[0] == 2
