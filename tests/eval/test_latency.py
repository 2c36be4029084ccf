"""Latency on a tiny random model: what is measured, and that the ideal is the same work without the dropped tokens."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlavaForConditionalGeneration

import vlmprune
from vlmprune.eval import random_weights
from vlmprune.eval.cells import Cell
from vlmprune.eval.flops import LanguageShape, VisionWork, request_cost
from vlmprune.eval.latency import (
    LatencyOptions,
    _staged,
    cache_bytes,
    ideal_prefill,
    made_up_request,
    measure,
    run_latency,
)
from vlmprune.eval.loading import DeviceError
from vlmprune.eval.random_weights import build_random

CELLS = [Cell(), Cell("uniform", 0.25), Cell("divprune", 8)]
STAGED = Cell("pyramiddrop", None, (("layers", (1, 2)), ("ratios", (0.5, 0.25))))


def test_every_stage_is_measured(toy, tmp_path, capsys):
    model = toy.model()
    options = LatencyOptions(CELLS, (1, 2), text_tokens=10, new_tokens=3, seconds=0.1, out=tmp_path / "out")
    rows = run_latency(model, "toy", options, Console(file=io.StringIO()))
    assert [(row.title, row.batch_size, row.visual_tokens_after) for row in rows] == [
        *(("full", 1, 64), ("uniform", 1, 16), ("divprune", 1, 8)),
        *(("full", 2, 64), ("uniform", 2, 16), ("divprune", 2, 8)),
    ]
    shape = LanguageShape.from_config(model.config)
    for row in rows:
        assert row.kv_cache_bytes == row.batch_size * shape.cache_bytes([row.visual_tokens_after + 10] * 3, 4)
        assert 0 < row.vision["median"] < row.end_to_end["median"]
        assert row.prefill["q25"] <= row.prefill["median"] <= row.prefill["q75"]
        assert row.overhead["median"] > 0
        assert row.peak_bytes is None
    printed = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in printed if "Written to" not in line) <= 100
    stored = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert len(stored["rows"]) == 6
    assert len(list(csv.DictReader((tmp_path / "out" / "latency.csv").open()))) == 6
    with pytest.raises(vlmprune.errors.NotAppliedError):
        vlmprune.remove(model)


def test_methods_inside_the_language_model_are_measured(toy):
    model = toy.model()
    row = measure(model, made_up_request(model, 1, 10), [STAGED], 3, 0.1)[0]
    assert row.visual_tokens_after == (64 + 32 + 16) / 3
    assert row.kv_cache_bytes == LanguageShape.from_config(model.config).cache_bytes([74, 42, 26], 4)
    assert row.overhead["median"] > 0


def test_the_ideal_is_the_plain_language_model(toy):
    model = toy.model()
    inputs = made_up_request(model, 1, 10)
    with torch.inference_mode(), vlmprune.pruned(model, "uniform", keep=8):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    assert cache_bytes(cache) == LanguageShape.from_config(model.config).cache_bytes([18] * 3, 4)
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    with torch.inference_mode():
        logits = ideal_prefill(model, inputs["pixel_values"], embeddings, [74] * 3)
        expected = model(inputs_embeds=embeddings).logits[:, -1:]
        staged = model.lm_head(_staged(model.model.language_model, embeddings, [74] * 3)[:, -1:])
    torch.testing.assert_close(logits, expected)
    torch.testing.assert_close(staged, expected)


def test_the_ideal_of_a_staged_method_does_the_work_of_its_stages(toy):
    config = toy.config()
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    inputs = made_up_request(model, 1, 10)
    embeddings = model.get_input_embeddings()(inputs["input_ids"]).detach()
    visual = [64, 20, 8]
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        ideal_prefill(model, inputs["pixel_values"], embeddings, [count + 10 for count in visual])
    assert counter.get_total_flops() == 2 * request_cost(config, VisionWork(crops=1), visual, 10).total


def test_random_weights_give_finite_logits_and_respect_memory(toy, monkeypatch):
    model = build_random(toy.config(), "float32", "cpu")
    logits = model(**made_up_request(model, 2, 6)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    monkeypatch.setattr(random_weights, "available_memory", lambda: 1000)
    with pytest.raises(DeviceError, match="GiB"):
        build_random(toy.config(), "float32", "cpu")
