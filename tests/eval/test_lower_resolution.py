"""The unpruned model on smaller pictures, as a baseline."""

from __future__ import annotations

import io

import pytest
import torch

pytest.importorskip("lmms_eval")

from rich.console import Console
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from support.families import llava_next
from vlmprune.errors import ParameterError, UnsupportedMethodError
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.bench import BenchOptions, run_bench
from vlmprune.eval.flops import vision_cost
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.lower_resolution import LowerResolution, taking_smaller_pictures
from vlmprune.eval.plugin.model import Vlmprune
from vlmprune.eval.run.cells import Cell, make_cells, parse_methods


@pytest.fixture(scope="module")
def qwen():
    return load_model("tiny-qwen2.5-vl")


def encoded(loaded, pictures, keep):
    resolution = LowerResolution(loaded.model, loaded.processor, keep)
    smaller, arguments = resolution.shrink(pictures)
    inputs = loaded.processor.image_processor(images=smaller, return_tensors="pt", **arguments)
    return resolution, inputs


@pytest.mark.parametrize("keep", [0.5, 0.25, 30, 1])
def test_packed_towers_get_a_smaller_grid(qwen, toy, keep):
    pictures = [toy.image(0, (192, 320)), toy.image(1, (200, 100))]
    resolution, inputs = encoded(qwen, pictures, keep)
    whole = resolution.whole_tokens(pictures)
    counts = (inputs["image_grid_thw"].prod(-1) // 4).tolist()
    for before, after, picture, (_, rows, columns) in zip(
        whole, counts, pictures, inputs["image_grid_thw"].tolist(), strict=True
    ):
        budget = keep if isinstance(keep, int) else round(keep * before)
        assert 0.7 * budget <= after <= budget
        assert keep == 1 or 2 / 3 <= (columns / rows) / (picture.width / picture.height) <= 3 / 2


def test_keeping_all_changes_nothing(qwen, toy):
    pictures = [toy.image(0, (190, 320))]
    _, inputs = encoded(qwen, pictures, 1.0)
    assert torch.equal(
        inputs["pixel_values"], qwen.processor.image_processor(images=pictures, return_tensors="pt")["pixel_values"]
    )


@pytest.mark.parametrize("keep", [0.5, 9])
def test_a_tower_over_one_tile_gets_a_smaller_square_and_costs_what_is_counted(toy, keep):
    model, processor = toy.model(), toy.processor()
    live = LiveModel(model, processor, resolution=LowerResolution(model, processor, keep))
    inputs = live.encode_turns([("what colour is the circle ?", [toy.image(0, (40, 70))])])
    side = 5 if keep == 0.5 else 3
    assert inputs["pixel_values"].shape == (1, 3, 4 * side, 4 * side)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == side**2
    with pytest.raises(ValueError, match="doesn't match model"):
        model(**inputs)
    hooks = dict(model.model.vision_tower._forward_pre_hooks)
    with torch.no_grad(), taking_smaller_pictures(model), FlopCounterMode(display=False) as counter:
        model.get_image_features(inputs["pixel_values"], **features(model))
    assert dict(model.model.vision_tower._forward_pre_hooks) == hooks
    (work,) = vision_cost(model.config).work(model.config, inputs, [1])
    assert counter.get_total_flops() == 2 * sum(vision_cost(model.config).macs(model.config, work, None))


def features(model):
    return {name: getattr(model.config, name) for name in ("vision_feature_layer", "vision_feature_select_strategy")}


def test_in_a_benchmark(model_folder, task_folder, tmp_path, capsys):
    options = BenchOptions(
        model=str(model_folder),
        methods=parse_methods("pool,lower_resolution", smaller_pictures=True),
        keeps=[0.25],
        tasks=["toy", "toy_pair"],
        out=tmp_path / "out",
        limit=3,
        batch_size=3,
        baselines=False,
        task_folders=[str(task_folder)],
        timing_seconds=0.1,
    )
    full, pool, smaller = run_bench(options, Console(file=io.StringIO()))
    assert smaller.title == "lower_resolution"
    assert (smaller.before, smaller.after) == (full.before, pool.after)
    assert smaller.flops["prefill"] == pool.flops["prefill"]
    assert smaller.flops["vision"] < 0.3 * pool.flops["vision"]
    assert smaller.flops["selection"] == 0
    assert smaller.prefill_ms > 0


def test_behind_lmms_eval(model_folder):
    model = Vlmprune(str(model_folder), "lower_resolution", 0.25)
    assert not model.pruned
    assert model.resolution.keep == 0.25
    with pytest.raises(ParameterError, match="takes a keep"):
        Vlmprune(str(model_folder), "lower_resolution")


def test_what_is_refused():
    model = llava_next.CASES[0].build(torch.float32)
    with (
        pytest.raises(UnsupportedMethodError, match="tiles of one size"),
        Cell("lower_resolution", 0.5).applied_to(model),
    ):
        pass
    with pytest.raises(ParameterError, match="vlmprune bench"):
        parse_methods("lower_resolution")
    with pytest.raises(ParameterError, match="no other parameters"):
        parse_methods("lower_resolution:seed=1", smaller_pictures=True)
    assert [cell.label for cell in make_cells([("lower_resolution", {})], [0.5, 9], 0)] == [
        *("full", "lower_resolution keep=0.5", "lower_resolution keep=9"),
    ]
    assert "lower_resolution" not in vlmprune.methods.registry.method_names()
