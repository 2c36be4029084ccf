"""Two processes give exactly the results of one."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from vlmprune.eval.ranks import Ranks

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


def test_two_processes_give_the_results_of_one(model_folder, task_folder, tmp_path):
    arguments = ["bench", "--model", str(model_folder), "--include-path", str(task_folder), "--tasks", "toy,toy_choice"]
    arguments += ["--methods", "divprune", "--no-baselines", "--keep", "8", "--limit", "5", "--timing-seconds", "0"]
    launch = ["-m", "accelerate.commands.launch", "--cpu", "--num_processes", "2", "--num_machines", "1"]
    launch += ["--mixed_precision", "no", "--dynamo_backend", "no", "--main_process_port", "0"]
    for out, command in {"one": [], "two": launch}.items():
        done = subprocess.run(
            [sys.executable, *command, "-m", "vlmprune", *arguments, "--out", str(tmp_path / out)],
            capture_output=True, text=True, timeout=600, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
    found = []
    for out in ("one", "two"):
        cells = [json.loads(file.read_text()) for file in sorted((tmp_path / out / "cells").iterdir())]
        found.append([{key: cell[key] for key in ("label", "tasks", "cost")} for cell in cells])
    assert len(found[0]) == 2
    assert found[0] == found[1]
