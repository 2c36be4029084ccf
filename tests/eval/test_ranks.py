"""Two processes give exactly the results of one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vlmprune.eval.run.ranks import Ranks

pytest.importorskip("lmms_eval")


def test_one_process_does_the_obvious(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    ranks = Ranks()
    assert ranks.is_main
    assert ranks.on_main(lambda: 3) == 3
    assert ranks.main_first(lambda: 4) == 4
    assert ranks.gathered([1, 2]) == [1, 2]
    ranks.require_same("x", 1)
    ranks.close()


ACCELERATE = [
    *("-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1"),
    *("--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"),
]
"""accelerate's ``--cpu`` starts one process only, whatever ``--num_processes`` says; ``--multi_gpu`` works without GPUs."""


def start(arguments, launch=()):
    return subprocess.run(
        [sys.executable, *launch, "-m", "vlmprune", *arguments],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip


def run_with_one_and_two(arguments, tmp_path):
    for out, launch in {"one": (), "two": ACCELERATE}.items():
        done = start([*arguments, "--out", str(tmp_path / out)], launch)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count(f"{tmp_path / out}") == 1
    return tmp_path / "one", tmp_path / "two"


def test_two_processes_give_the_results_of_one(model_folder, task_folder, tmp_path):
    arguments = ["bench", "--model", str(model_folder), "--include-path", str(task_folder), "--tasks", "toy,toy_choice"]
    arguments += ["--methods", "divprune", "--no-baselines", "--keep", "8", "--limit", "5", "--timing-seconds", "0"]
    found = []
    for folder in run_with_one_and_two(arguments, tmp_path):
        cells = [json.loads(file.read_text()) for file in sorted((folder / "cells").iterdir())]
        found.append([{key: cell[key] for key in ("label", "tasks", "cost")} for cell in cells])
    assert len(found[0]) == 2
    assert found[0] == found[1]


def test_two_processes_share_prompts_without_labels(model_folder, tmp_path, toy):
    data = tmp_path / "data"
    data.mkdir()
    for i in range(5):
        toy.image(i).save(data / f"{i}.png")
    (data / "prompts.txt").write_text("what colour is the circle ?\n")
    arguments = ["bench", "--model", str(model_folder), "--data", str(data), "--methods", "divprune", "--keep", "8"]
    arguments += ["--no-baselines", "--batch-size", "2", "--new-tokens", "3"]
    one, two = run_with_one_and_two(arguments, tmp_path)
    rows = [json.loads((folder / "fidelity.json").read_text())["rows"] for folder in (one, two)]
    assert rows[0] == rows[1]
    assert rows[0][0]["items"] == 5


def test_two_processes_measure_latency_and_must_agree(model_folder, tmp_path):
    arguments = ["latency", "--model", str(model_folder), "--methods", "uniform", "--keep", "8", "--seconds", "0"]
    arguments += ["--image-size", "32", "--text-tokens", "8", "--new-tokens", "2", "--device", "cpu"]
    done = start([*arguments, "--out", str(tmp_path / "out")], ACCELERATE)
    assert done.returncode == 0, done.stderr
    result = json.loads((tmp_path / "out" / "latency.json").read_text())
    assert result["processes"] == 2
    assert [row["visual_tokens_after"] for row in result["rows"]] == [64, 8]
    assert done.stdout.count("Written to") == 1


def test_processes_that_were_started_differently_are_an_error(model_folder, tmp_path):
    script = tmp_path / "differing.py"
    script.write_text(
        "import os, sys\n"
        "from vlmprune.cli import app\n"
        "app([*sys.argv[1:], '--text-tokens', str(8 + int(os.environ['RANK']))])\n"
    )
    arguments = ["latency", "--model", str(model_folder), "--methods", "uniform", "--keep", "8", "--seconds", "0"]
    arguments += ["--image-size", "32", "--new-tokens", "2", "--device", "cpu", "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [sys.executable, *ACCELERATE, str(script), *arguments], capture_output=True, text=True, timeout=600, check=False
    )
    assert done.returncode != 0
    assert "error: The processes disagree about the configuration" in done.stderr
    assert not (tmp_path / "out").exists()
