"""Latency on tiny random models: what is measured, and that the ideal is the same work without the dropped tokens."""

from __future__ import annotations

import csv
import io
import json

import pytest
import torch
from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText

import vlmprune
from support.tiny_configs import MAKERS, tiny_config
from vlmprune.errors import ParameterError, UnknownNameError
from vlmprune.eval.flops import LanguageShape, request_cost, vision_cost
from vlmprune.eval.models.random_weights import build_random
from vlmprune.eval.models.synthetic_request import parse_sizes, synthetic_request
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.run.result_folder import ResultFolderError
from vlmprune.eval.speed import latency_command
from vlmprune.eval.speed.ideal_prefill import IdealPrefill
from vlmprune.eval.speed.latency import cache_bytes, measure
from vlmprune.eval.speed.latency_command import LatencyOptions, latency_table, run_latency

CELLS = [Cell(), Cell("uniform", 0.25), Cell("divprune", 8)]
STAGED = Cell("pyramiddrop", None, (("layers", (1, 2)), ("ratios", (0.5, 0.25))))
SIZE = (32, 32)


def request_for(model, batch_size=1, text=10, size=SIZE):
    return synthetic_request(model.config, size, text, batch_size)


def run(model, out, **changes):
    given = {
        **{"cells": CELLS, "batch_sizes": (1, 2), "image_sizes": (SIZE,), "text_tokens": 10, "new_tokens": 3},
        **{"seconds": 0.05, "out": out},
    }
    return run_latency(model, "toy", LatencyOptions(**{**given, **changes}), console=Console(file=io.StringIO()))


def test_every_stage_is_measured(toy, tmp_path, capsys):
    model = toy.model()
    rows = run(model, tmp_path / "out")
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
        assert row.peak_bytes is None or row.peak_bytes >= 0
    printed = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in printed if "Written to" not in line) <= 100
    assert not any("…" in line for line in printed)
    stored = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert len(stored["rows"]) == 6
    lines = list(csv.DictReader((tmp_path / "out" / "latency.csv").open()))
    assert [line["image_size"] for line in lines] == ["32x32"] * 6
    with pytest.raises(vlmprune.errors.NotAppliedError):
        vlmprune.remove(model)


def test_an_interrupted_run_goes_on_and_does_not_mix(toy, tmp_path, monkeypatch):
    real, calls = latency_command.measure, []

    def interrupted(*args):
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(latency_command, "measure", interrupted)
    model = toy.model()
    with pytest.raises(KeyboardInterrupt):
        run(model, tmp_path / "out")
    rows = run(model, tmp_path / "out")
    assert len(calls) == 3
    assert run(model, tmp_path / "out") == rows
    assert len(calls) == 3
    run(model, tmp_path / "out", batch_sizes=(1,), image_sizes=(SIZE, (40, 32)))
    assert len(calls) == 4
    with pytest.raises(ResultFolderError, match="new_tokens"):
        run(model, tmp_path / "out", new_tokens=4)
    with pytest.raises(ResultFolderError, match="cells"):
        run(model, tmp_path / "out", cells=CELLS[:2])


def test_methods_inside_the_language_model_are_measured(toy):
    model = toy.model()
    row = measure(model, request_for(model), SIZE, [STAGED], 3, 0.05)[0]
    assert row.visual_tokens_after == (64 + 32 + 16) / 3
    assert row.kv_cache_bytes == LanguageShape.from_config(model.config).cache_bytes([74, 42, 26], 4)
    assert row.overhead["median"] > 0


def test_budgets_that_a_picture_does_not_allow_are_left_out(toy):
    model, notes = toy.model(), []
    cells = [Cell(), Cell("pyramiddrop", 2), Cell("uniform", 2)]
    rows = measure(model, request_for(model), SIZE, cells, 3, 0.01, on_left_out=notes.append)
    assert [row.title for row in rows] == ["full", "uniform"]
    assert "pyramiddrop keep=2: not reachable" in notes[0].note


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("model_type", MAKERS)
def test_every_family_is_measured(model_type, dtype):
    model = build_random(tiny_config(model_type), dtype, "cpu")
    inputs = request_for(model, 2, size=(50, 40))
    inputs["pixel_values"] = inputs["pixel_values"].to(model.dtype)
    row, pruned = measure(model, inputs, (50, 40), [Cell(), Cell("divprune", 5)], 3, 0.01)
    visual = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    assert (row.visual_tokens_before, row.visual_tokens_after, row.text_tokens) == (visual, visual, 10)
    shape = LanguageShape.from_config(model.config)
    assert row.kv_cache_bytes == 2 * shape.cache_bytes([visual + 10] * 3, model.dtype.itemsize)
    assert pruned.kv_cache_bytes == 2 * shape.cache_bytes([5 + 10] * 3, model.dtype.itemsize)


@pytest.mark.parametrize("model_type", MAKERS)
@pytest.mark.parametrize("stages", [(7, 7, 7), (12, 5, 2)], ids=str)
def test_the_ideal_does_the_work_of_the_kept_tokens(model_type, stages):
    config = tiny_config(model_type)
    config._experts_implementation = "eager"
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    inputs = request_for(model, 2, size=(50, 40))
    with torch.no_grad(), FlopCounterMode(display=False) as counter:
        IdealPrefill.prepare(model, inputs, stages).run()
    work = vision_cost(config).work(config, inputs, [1, 1])
    assert counter.get_total_flops() == 2 * sum(request_cost(config, each, stages, 10).total for each in work)


@pytest.mark.parametrize("model_type", MAKERS)
def test_the_ideal_stages_are_the_plain_language_model(model_type):
    model = build_random(tiny_config(model_type), "float32", "cpu")
    inputs = request_for(model, 2, size=(50, 40))
    visual = int((inputs["input_ids"][0] == model.config.image_token_id).sum())
    ideal = IdealPrefill.prepare(model, inputs, [visual] * 3)
    language = model.model.language_model
    with torch.inference_mode():
        whole = ideal.run()
        deep = ideal._deep_features(model.model.get_image_features(**_image_inputs(inputs), return_dict=True))
        staged = model.lm_head(ideal._staged(language, deep)[:, -1:])
    torch.testing.assert_close(staged, whole)


def _image_inputs(inputs):
    return {key: inputs[key] for key in ("pixel_values", "image_sizes", "image_grid_thw") if key in inputs}


def test_kept_tokens_are_what_the_cache_holds(toy):
    model = toy.model()
    inputs = request_for(model)
    with torch.inference_mode(), vlmprune.pruned(model, "uniform", keep=8):
        cache = model(**inputs, use_cache=True, logits_to_keep=1).past_key_values
    assert cache_bytes(cache) == LanguageShape.from_config(model.config).cache_bytes([18] * 3, 4)


def test_wide_numbers_fit_in_the_table(toy):
    model = toy.model()
    row = measure(model, request_for(model), SIZE, [Cell("divprune", 0.25)], 3, 0.01)[0]
    for milliseconds in (99999.9, 9123456.7):
        slow = {"median": milliseconds, "q25": 0.9 * milliseconds, "q75": 1.1 * milliseconds}
        wide = dict.fromkeys(("vision", "selection", "prefill", "ideal", "first_token", "end_to_end"), slow)
        wide |= {
            "kv_cache_bytes": 2**33,
            "peak_bytes": 2**37,
            "image_size": (2304, 2304),
            "visual_tokens_after": 12345.0,
        }
        console = Console(file=io.StringIO(), width=100)
        console.print(latency_table([type(row)(**{**row.__dict__, **wide})]))
        assert "…" not in console.file.getvalue()


def test_sizes_of_pictures_are_read():
    assert parse_sizes("336, 640x480,336") == [(336, 336), (640, 480)]
    for text in ("", "0", "12x", "large"):
        with pytest.raises(ParameterError, match="--image-size"):
            parse_sizes(text)


def test_requests_hold_no_special_text(toy):
    for model_type in MAKERS:
        config = tiny_config(model_type)
        inputs = synthetic_request(config, (50, 40), 20, batch_size=3)
        text = inputs["input_ids"][inputs["input_ids"] != config.image_token_id]
        assert len(text) == 60
        markers = {92, 93} if "qwen" in model_type else set()
        video = {91} if hasattr(config, "video_token_id") else set()
        assert set(text.tolist()) & ({0, 1, 2, 90} | markers | video) == markers
    with pytest.raises(ParameterError, match="3 or more"):
        synthetic_request(config, (50, 40), 2)
    with pytest.raises(UnknownNameError, match="llama"):
        synthetic_request(toy.config().text_config, (50, 40), 20)


def test_random_weights_give_finite_logits(toy):
    model = build_random(toy.config(), "float32", "cpu")
    logits = model(**request_for(model, 2, text=6)).logits
    assert logits.isfinite().all()
    assert logits.std() > 0
    assert {p.dtype for p in model.parameters()} == {torch.float32}
