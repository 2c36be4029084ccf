"""HoloV's official order and its zero vectors."""

import pytest
import torch

from support import method_batches as build
from vlmprune.errors import ParameterError, UnknownNameError
from vlmprune.methods import HoloV


def hot_run(method):
    """Two images; in the first one run has nearly all of the attention."""
    layouts = [build.raster_layout(4, 8), build.anyres_layout((1, 2), 3, 100, 200)]
    batch = build.random_batch(method, layouts, 1)
    (signal,) = method.vision_signals(batch.tower)
    batch.vision[signal][4:8] += 1e4
    return batch


def test_what_a_run_cannot_hold_is_zero_vectors_in_the_official_order():
    method = HoloV(keep=12, num_patches=8, faithful=True)
    batch = hot_run(method)
    selection = method.select(batch)
    build.check_selection(selection, batch)
    order = method.official_order(method.run_scores(batch), batch)[0]
    assert order[:4].tolist() == [4, 5, 6, 7]
    assert (order >= 0).sum() < 12
    values = selection.features[:12]
    for value, token in zip(values, order.tolist(), strict=True):
        assert torch.equal(value, batch.features[token] if token >= 0 else torch.zeros(8))
    deep = torch.randn(sum(batch.counts), 3)
    assert torch.equal(selection.merge(deep)[:4], deep[4:8])
    groups = selection.groups[: batch.counts[0]]
    assert [groups.tolist().index(place) for place in range(int((order >= 0).sum()))] == order[order >= 0].tolist()


@pytest.mark.parametrize("mode", ["code", "paper"])
def test_the_budget_is_spent_on_real_tokens_otherwise(mode):
    method = HoloV(keep=12, num_patches=8, mode=mode)
    batch = hot_run(method)
    selection = method.select(batch)
    build.check_selection(selection, batch)
    assert selection.features is None
    assert {4, 5, 6, 7} <= set(selection.kept[:12].tolist())


def test_bad_parameters_are_refused():
    with pytest.raises(UnknownNameError, match="'paper'"):
        HoloV(mode="papr")
    with pytest.raises(ParameterError, match="faithful"):
        HoloV(mode="paper", faithful=True)
    with pytest.raises(ParameterError, match="beta"):
        HoloV(beta=-1)
    with pytest.raises(ParameterError, match="num_patches"):
        HoloV(num_patches=0)
