"""Accuracy joined with the measured time of the vision tower, and the screens that PixelPrune is measured on."""

from __future__ import annotations

import csv
from functools import partial

import numpy as np
import pytest
import torch

pytest.importorskip("lmms_eval")

from support.deeper_tower import deeper_tower
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import ParameterError
from vlmprune.eval.accuracy.task_index import find_tasks
from vlmprune.eval.speed import tower_accuracy
from vlmprune.eval.speed.tower_accuracy import accuracy_table, join, measure_cells, tower_cells
from vlmprune.eval.training.common.dataset_screens import SCREENS_FILE, make_rows
from vlmprune.methods import PixelPrune

LINES = [
    {"method": method, "keep": keep, "relative": "0.9", "gflops_vision": gflops, "gflops_selection": "0.1"}
    for method, keep, gflops in (
        ("full", "", "2"),
        ("divprune", "0.5", "2"),
        ("tome", "0.5", "1"),
        ("expedite:k=8", "0.5", "1"),
        ("pixelprune", "", "1"),
        ("lower_resolution", "0.5", "1"),
    )
]


def test_rows_that_spare_the_tower():
    assert [cell.label for cell, _ in tower_cells(LINES)] == [
        *("full", "tome keep=0.5", "expedite:k=8 keep=0.5", "pixelprune", "lower_resolution keep=0.5")
    ]
    with pytest.raises(ParameterError, match="no row of the unpruned model"):
        tower_cells(LINES[1:])


def test_times_are_joined_with_accuracy():
    case = deeper_tower(LLAVA_CLIP_GQA)
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 4]])
    rows = tower_cells(LINES[:3])
    patches = []
    handle = model.model.vision_tower.encoder.layers[2].mlp.register_forward_hook(
        lambda module, args, output: patches.append(args[0].shape[1])
    )
    times = measure_cells(model, [cell for cell, _ in rows], lambda cell: [inputs, inputs], 0.0)
    handle.remove()
    full, tome = join(rows, times)
    assert (full.method, tome.method, tome.keep, tome.relative) == ("full", "tome", "0.5", 0.9)
    assert (full.gflops, tome.gflops) == (2.1, 1.1)
    assert full.rounds == tome.rounds == 3
    assert full.speedup["median"] == 1
    # One untimed picture and two timed ones in each of four rounds.
    assert len(patches) == 2 * 3 * 4
    assert len(set(patches)) == 2
    assert accuracy_table([full, tome], "tiny").row_count == 2


def test_screens_are_made_again_and_are_flat():
    stored = make_rows(3)
    shipped = type(stored).from_parquet(str(SCREENS_FILE))
    assert len(shipped) == 120
    assert stored[:3]["reading_answer"] == shipped[:3]["reading_answer"]
    for mine, file in zip(stored, shipped, strict=False):
        assert file["image"].size == (192, 192)
        assert np.array_equal(np.asarray(mine["image"]), np.asarray(file["image"]))
        pixels = np.asarray(file["image"].convert("RGB"), np.float32) / 255
        tokens = torch.from_numpy(pixels).view(12, 16, 12, 16, 3).transpose(1, 2).reshape(144, -1)
        assert 0.2 < PixelPrune().unpredicted(tokens, [(12, 12)], 0.0).float().mean() < 0.7


def test_the_command_joins_a_benchmark_with_times(model_folder, task_folder, tmp_path, monkeypatch):
    csv_file, out = tmp_path / "results.csv", tmp_path / "out.csv"
    names = list(LINES[0])
    rows = [LINES[0], {**LINES[2], "keep": "0.7"}, {**LINES[-1], "keep": "0.25"}]
    csv_file.write_text("\n".join([",".join(names), *(",".join(row[name] for name in names) for row in rows)]) + "\n")
    monkeypatch.setattr(tower_accuracy, "find_tasks", partial(find_tasks, folders=[str(task_folder)]))
    tower_accuracy.main(str(model_folder), csv_file, "toy", 2, 0.0, out)
    lines = list(csv.DictReader(out.open()))
    assert [(line["method"], line["keep"]) for line in lines] == [
        *(("full", ""), ("tome", "0.7"), ("lower_resolution", "0.25"))
    ]
    assert all(float(line["time_ms_median"]) > 0 for line in lines)
