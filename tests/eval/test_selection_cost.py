"""What selecting costs: what is counted, that the model is left as it was, and the command."""

from __future__ import annotations

import csv
import gc
import io
import time

import pytest
import torch
from rich.console import Console

import vlmprune
from support.tiny_configs import tiny_config
from vlmprune.eval.models.random_weights import build_random
from vlmprune.eval.models.synthetic_request import synthetic_request
from vlmprune.eval.run.cells import Cell, make_cells, parse_methods, usable_cells
from vlmprune.eval.speed import selection_command
from vlmprune.eval.speed.hook_clock import HookClock
from vlmprune.eval.speed.rounds import clocked
from vlmprune.eval.speed.selection_command import (
    prepare_cells,
    run_selection_cost,
    with_short_language,
    with_short_tower,
)
from vlmprune.eval.speed.selection_cost import leaves_tower_alone, measure_selection, without_layers
from vlmprune.eval.speed.shared_encodings import SharedEncodings
from vlmprune.methods import VAR, DivPrune, PyramidDrop

STAGED = Cell("pyramiddrop", None, (("layers", (1, 2)), ("ratios", (0.5, 0.25))))


def hooks_of(model):
    return [(dict(m._forward_hooks), dict(m._forward_pre_hooks), set(vars(m))) for m in model.modules()]


@pytest.fixture
def request_(toy):
    model = toy.model()
    return model, synthetic_request(model.config, (32, 32), 10)


def test_every_method_has_its_line(request_, tmp_path):
    model, inputs = request_
    methods = parse_methods("all")
    cells = [*usable_cells(model, make_cells(methods, [0.9], 0), methods)[0], STAGED]
    model(**inputs)
    before = hooks_of(model)
    file, printed = tmp_path / "cost.csv", io.StringIO()
    rows = run_selection_cost(model, [inputs, inputs], cells, 2, file, "toy", Console(file=printed, width=100))
    assert hooks_of(model) == before
    titles = [cell.title for cell in cells if not cell.is_full]
    assert [row.title for row in rows] == titles * 2
    assert {"divprune", "fastv", "pyramiddrop", "todre"} <= set(titles)
    for row in rows:
        assert row.visual_tokens_before == 64
        assert 0 < row.selection["median"] < row.pruned["median"]
        assert row.rounds == 2
    assert {row.title: row.visual_tokens_after for row in rows}[STAGED.title] == pytest.approx((64 + 32 + 16) / 3)
    lines = list(csv.DictReader(file.open()))
    assert [line["title"] for line in lines] == titles * 2
    assert {(line["model"], line["dtype"], line["device"]) for line in lines} == {("toy", "float32", "cpu")}
    assert float(lines[0]["selection_ms_q25"]) <= float(lines[0]["selection_ms_median"])
    assert "share %" in printed.getvalue()


def test_slow_picking_shows_and_slow_layers_do_not(request_, monkeypatch):
    model, inputs = request_
    for cls, entry, cell in ((DivPrune, "select", Cell("divprune", 0.5)), (PyramidDrop, "select_at_layer", STAGED)):
        picked = getattr(cls, entry)
        with monkeypatch.context() as patch:
            patch.setattr(cls, entry, lambda self, batch, picked=picked: time.sleep(0.05) or picked(self, batch))
            (slow,) = measure_selection(model, inputs, [cell], 2)
        assert 50 <= slow.selection["median"] < 200
        handle = model.model.language_model.layers[1].mlp.register_forward_hook(lambda *_: time.sleep(0.05))
        (plain,) = measure_selection(model, inputs, [cell], 2)
        handle.remove()
        if cell is not STAGED:
            assert plain.selection["median"] < 40
        assert plain.full["median"] > 50


def test_a_method_that_changes_attention_is_counted_in_the_layers(request_, monkeypatch):
    model, inputs = request_
    cell, change = Cell("var", None, (("first_layer", 1), ("tau", 1.5))), VAR.change
    monkeypatch.setattr(VAR, "change", lambda self, *given: time.sleep(0.05) or change(self, *given))
    printed = io.StringIO()
    (row,) = run_selection_cost(model, [inputs], [cell], 2, None, "toy", Console(file=printed, width=100))
    layers = model.config.get_text_config().num_hidden_layers
    assert 50 * (layers - 1) <= row.selection["median"] < row.pruned["median"]
    assert row.visual_tokens_after == row.visual_tokens_before
    assert row.share["median"] == float("inf")
    assert "Drops nothing, and adds to the full prefill (later steps are not measured): var" in printed.getvalue()
    left_out = []
    assert not measure_selection(model, inputs, [cell], 2, left_out.append, depth=3.0)
    assert "--language-layers 0" in left_out[0].note


def test_tower_and_hooks_inside_it_are_told_apart(request_):
    model, inputs = request_
    clock = HookClock(model.device)
    projection = model.model.vision_tower.encoder.layers[1].self_attn.q_proj
    forward = projection.forward
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.5):
        hook = next(iter(projection._forward_hooks))
        slow = projection._forward_hooks[hook]
        projection._forward_hooks[hook] = lambda *args: time.sleep(0.03) or slow(*args)
        projection.forward = lambda *args: time.sleep(0.1) or forward(*args)
        with clock.watching(model):
            model(**inputs)
        del projection.forward
    assert 0.1 <= clock.in_tower < 0.2
    assert 0.03 <= clock.in_hooks < 0.1
    assert not projection._forward_hooks


def test_budgets_that_the_request_does_not_allow_are_left_out(request_):
    model, inputs = request_
    left_out = []
    rows = measure_selection(model, inputs, [Cell("fastv", 8), Cell("uniform", 8)], 2, left_out.append)
    assert [row.title for row in rows] == ["uniform"]
    assert "nearest: keep=43" in left_out[0].note


def test_layers_come_back(request_):
    language = request_[0].model.language_model
    layers = language.layers
    with without_layers(request_[0]):
        assert list(language.layers) == list(language.layers[:2]) == []
        assert language.layers[0] is layers[0]
    assert language.layers is layers
    with pytest.raises(IndexError), without_layers(request_[0]):
        language.layers[7]
    assert language.layers is layers


@pytest.mark.parametrize("model_type", ["llava_next", "qwen2_5_vl", "qwen3_vl"])
def test_other_families(model_type):
    model = build_random(tiny_config(model_type), "float32", "cpu")
    inputs = synthetic_request(model.config, (64, 64), 10)
    cells = [Cell("divprune", 0.5), Cell("pyramiddrop", None, (("layers", (1,)), ("ratios", (0.5,))))]
    rows = measure_selection(model, inputs, cells, 2)
    assert [row.visual_tokens_after < row.visual_tokens_before for row in rows] == [True, True]


def test_methods_in_the_tower_are_measured_there(request_):
    model, inputs = request_
    cell = Cell("tome", 0.75)
    encoder = model.model.vision_tower.encoder
    with torch.no_grad():
        (plain,) = measure_selection(model, inputs, [cell], 2, clock="cpu")
        handle = encoder.layers[0].mlp.register_forward_hook(lambda *_: time.sleep(0.05))
        (slow,) = measure_selection(model, inputs, [cell], 2)
        handle.remove()
    assert (plain.where, plain.clock, slow.clock) == ("vision tower", "cpu", "wall")
    assert slow.full["median"] > 50
    assert plain.visual_tokens_after == 64
    assert 0 < plain.selection["median"] < plain.pruned["median"]


def test_a_text_tower_with_random_weights_serves_the_methods_that_need_one(monkeypatch, toy):
    monkeypatch.setattr(selection_command, "preset_config", lambda name: toy.config())
    model = toy.model()
    cells, left_out, deep = prepare_cells(model, "toy", parse_methods("cdpruner,tome"), [0.75])
    assert [cell.method for cell in cells] == ["full", "cdpruner", "tome"]
    assert not left_out
    assert deep.config.get_text_config().num_hidden_layers == 1
    rows = measure_selection(model, synthetic_request(model.config, (32, 32), 10), cells, 2, tower_model=deep)
    assert [row.where for row in rows] == ["language model", "vision tower"]


@pytest.mark.parametrize("model_type", ["llava_onevision", "qwen2_5_vl"])
def test_videos_and_layers_that_stand_for_several(model_type):
    config = with_short_tower(tiny_config(model_type), 1, packed=True)
    config, depth = with_short_language(config, 1)
    assert depth == 3
    assert with_short_language(config, 0) == (config, 1.0)
    model = build_random(config, "float32", "cpu")
    inputs = synthetic_request(config, (64, 64), 15, video_frames=8)
    left_out = []
    cells = [Cell("divprune", 0.25), Cell("fastv", 0.5)]
    (row,) = measure_selection(model, inputs, cells, 2, left_out.append, depth=depth)
    assert row.visual_tokens_after < row.visual_tokens_before
    assert "--language-layers 0" in left_out[0].note
    assert row.selection_peak_bytes is None or row.selection_peak_bytes >= 0


def count_runs(module):
    """Return a list that grows by one with every run of a module."""
    runs = []
    module.register_forward_hook(lambda *_: runs.append(1))
    return runs


@pytest.mark.parametrize("model_type", ["llava_onevision", "qwen2_5_vl"])
def test_methods_that_read_the_same_of_the_tower_share_an_encoding(model_type):
    model = build_random(tiny_config(model_type), "float32", "cpu")
    inputs = synthetic_request(model.config, (64, 64), 15, video_frames=4)
    names = {"nothing": ["evs", "vidcom2", "divprune", "uniform"], "attention": ["flashvid", "holitom", "fastervlm"]}
    runs = count_runs(getattr(model.model, "vision_tower", None) or model.model.visual)
    rounds = 3
    measure_selection(model, inputs, [Cell(name, 0.5) for name in names["nothing"]], rounds)
    assert len(runs) == 1
    runs.clear()
    rows = measure_selection(model, inputs, [Cell(name, 0.5) for part in names.values() for name in part], rounds)
    assert len(runs) == 1 + rounds
    assert all(row.visual_tokens_after < row.visual_tokens_before for row in rows)


def test_a_shared_encoding_chooses_and_costs_as_one_of_its_own(request_, monkeypatch):
    """What a hook in the tower takes counts for every method that reads what it captured."""
    model, inputs = request_
    names, layer = ["fastervlm", "divprune", "visionzip"], model.model.vision_tower.encoder.layers[1].self_attn.q_proj
    clock, kept, kept_alone = HookClock(model.device), [], []
    with torch.no_grad():
        encodings = SharedEncodings()
        for name in [*names, *names]:
            with vlmprune.pruned(model, name, keep=0.5):
                for key, hook in layer._forward_hooks.items():
                    layer._forward_hooks[key] = lambda *args, hook=hook: time.sleep(0.03) or hook(*args)
                model(**inputs)
                kept_alone.append(vlmprune.last_run(model).images[0].kept.tolist())
                clock.reset()
                with clock.watching(model, encodings):
                    whole = clocked(lambda: model(**inputs), model.device)
                kept.append(vlmprune.last_run(model).images[0].kept.tolist())
            reads = name != "divprune"
            assert reads == (clock.in_hooks >= 0.03)
            assert clock.in_hooks - clock.from_before < whole
    assert clock.from_before >= 0.03
    assert kept == kept_alone


def test_a_method_that_changes_what_the_tower_gives_has_an_encoding_of_its_own():
    model = build_random(tiny_config("qwen2_5_vl"), "float32", "cpu")
    inputs = synthetic_request(model.config, (64, 64), 15)
    runs = count_runs(model.model.visual)
    assert leaves_tower_alone(Cell("divprune", 0.5))
    assert not leaves_tower_alone(Cell("tome", 0.5))
    assert not leaves_tower_alone(Cell("pixelprune", 0.5))
    rows = measure_selection(model, inputs, [Cell("pixelprune", 0.5), Cell("divprune", 0.5)], 2)
    # One for all, and of the other the peak and two repeats in each of two rounds.
    assert len(runs) == 1 + 1 + 2 * 2
    assert len(rows) == 2


def test_memory_of_the_selection_shows(request_, monkeypatch):
    model, inputs = request_
    picked = DivPrune.select

    def wasteful(self, batch):
        gc.collect()
        torch.ones(64 * 2**20).sum()
        return picked(self, batch)

    monkeypatch.setattr(DivPrune, "select", wasteful)
    # Garbage of earlier work, whose release would hide what the method takes.
    gc.disable()
    try:
        garbage = [torch.ones(64 * 2**20)]
        garbage.append(garbage)
        del garbage
        (row,) = measure_selection(model, inputs, [Cell("divprune", 0.5)], 2)
    finally:
        gc.enable()
    if row.selection_peak_bytes is not None:
        assert 200 * 2**20 < row.selection_peak_bytes < 600 * 2**20


def test_short_tower():
    config = with_short_tower(tiny_config("llava_next"), 1)
    assert config.vision_config.num_hidden_layers == 1


def test_command(monkeypatch, tmp_path, toy):
    from typer.testing import CliRunner

    from vlmprune.cli import app

    monkeypatch.setattr(selection_command, "preset_config", lambda name: toy.config())
    monkeypatch.setattr(selection_command, "preset_image_processor", lambda name: None)
    file = tmp_path / "cost.csv"
    given = ["selection-cost", "--methods", "all", "--keep", "0.5", "--image-size", "32", "--rounds", "2"]
    result = CliRunner().invoke(app, [*given, "--device", "cpu", "--out", str(file)])
    assert result.exit_code == 0, result.output
    assert "fastv keep=0.5: not reachable" in result.output
    assert "globalcom2: not served" in result.output
    assert "divprune" in file.read_text()
    bad = CliRunner().invoke(app, ["selection-cost", "--image-size", "wide"])
    assert bad.exit_code == 2
