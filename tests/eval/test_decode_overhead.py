"""The decode overhead: what is compared, and that it sees work added to a decode step."""

from __future__ import annotations

import csv
import time

import pytest
import torch

import vlmprune
from vlmprune.eval.models.synthetic_request import synthetic_request
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.speed.decode_overhead import measure_decode, same_entries, with_shared_weights, write_decode_csv
from vlmprune.patches.engine import PruningEngine

CELLS = [Cell("divprune", 0.25), Cell("pyramiddrop", None, (("layers", (1, 2)), ("ratios", (0.5, 0.25))))]


@pytest.fixture
def request_(toy):
    model = toy.model()
    return model, synthetic_request(model.config, (32, 32), 10)


def test_a_line_for_every_method(request_, tmp_path):
    model, inputs = request_
    rows = measure_decode(model, inputs, [Cell("full", None), *CELLS], steps=4)
    assert [row.title for row in rows] == [cell.title for cell in CELLS]
    assert rows[0].cache_length == rows[0].caller_length - 64 + 16
    assert rows[1].cache_length == rows[1].caller_length
    assert "_vlmprune" not in vars(model)
    write_decode_csv(tmp_path / "decode.csv", rows, {"model": "toy"})
    write_decode_csv(tmp_path / "decode.csv", rows, {"model": "toy"})
    lines = list(csv.DictReader((tmp_path / "decode.csv").open()))
    assert [line["title"] for line in lines] == [row.title for row in rows] * 2
    assert all(float(line["overhead"]) > 0 for line in lines)


def test_the_unpatched_side_has_the_same_weights_and_entries(request_):
    model, inputs = request_
    patched = with_shared_weights(model)
    assert all(a is b for a, b in zip(model.parameters(), patched.parameters(), strict=True))
    with torch.no_grad(), vlmprune.pruned(patched, CELLS[1].make_method()):
        cache = patched(**inputs, use_cache=True).past_key_values
    assert "_vlmprune" not in vars(model)
    plain = same_entries(cache)
    for layer, other in zip(plain.layers, cache.layers, strict=True):
        assert torch.equal(layer.keys, other.keys)
        assert torch.equal(layer.values, other.values)


def test_slow_hooks_show(request_, monkeypatch):
    model, inputs = request_
    enter = PruningEngine._enter_model
    monkeypatch.setattr(PruningEngine, "_enter_model", lambda *args: time.sleep(0.05) or enter(*args))
    (row,) = measure_decode(model, inputs, CELLS[:1], steps=4)
    assert row.pruned_ms - row.unpatched_ms > 40
    assert row.overhead > 2
