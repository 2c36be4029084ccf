"""Suites of tasks, means of abilities, and the sentence that closes a benchmark."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("lmms_eval")

from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.errors import UnknownNameError
from vlmprune.eval.accuracy import suites
from vlmprune.eval.accuracy.suites import SUITES, Suite, ability_means, find_suites
from vlmprune.eval.accuracy.task_index import (
    EMBEDDED_TASKS,
    TaskLoadError,
    declared_names,
    find_tasks,
    shipped_task_texts,
)
from vlmprune.eval.reports.summary import make_rows
from vlmprune.eval.tune.from_table import closing_choice


def test_every_task_of_a_suite_exists():
    known = {*declared_names(shipped_task_texts()), *EMBEDDED_TASKS}
    assert {task for suite in SUITES.values() for task in suite.tasks} <= known
    assert SUITES["scenes"].items == 3000
    with pytest.raises(UnknownNameError, match="image-core"):
        find_suites(["image-cor"])


def test_the_documentation_has_every_suite_with_its_sizes():
    table = (Path(__file__).parents[2] / "docs" / "measuring.md").read_text(encoding="utf-8").splitlines()
    for name, suite in SUITES.items():
        (line,) = (line for line in table if line.startswith(f"| `{name}` |"))
        assert line.endswith(f"| {suite.items} |")
        assert all(f"`{task}`" in line for task in suite.tasks)


def test_means_are_over_the_tasks_of_an_ability():
    suite = Suite("", {"look": {"a": 1, "b": 1}, "read": {"c": 1}, "count": {"d": 1}})
    assert ability_means([suite], {"a": 0.5, "b": 1.0, "c": 0.25}) == {"look": 0.75, "read": 0.25}


def test_what_cannot_be_loaded_is_listed_together(task_folder, tmp_path):
    text = (task_folder / "toy.yaml").read_text()
    for name in ("gone", "lost"):
        changed = text.replace("task: toy", f"task: {name}").replace("items.parquet", "nowhere.parquet")
        (tmp_path / f"{name}.yaml").write_text(changed)
    for file in ("toy.yaml", "toy_utils.py", "items.parquet"):
        (tmp_path / file).write_bytes((task_folder / file).read_bytes())
    words = r"2 of 3 tasks cannot be loaded.*gone \(.*lost \(.*Allowed as they are: --tasks toy"
    with pytest.raises(TaskLoadError, match=words):
        find_tasks(["gone", "toy", "lost"], "llava", [str(tmp_path)])


def test_a_suite_runs_with_means_a_smaller_picture_and_a_choice(model_folder, task_folder, tmp_path, monkeypatch):
    toys = Suite("", {"colours": {"toy": 6}, "pairs": {"toy_pair": 6}})
    monkeypatch.setattr(suites, "SUITES", {**SUITES, "toys": toys})
    out = tmp_path / "out"
    arguments = ["bench", "--model", str(model_folder), "--suite", "toys", "--include-path", str(task_folder)]
    arguments += ["--keep", "0.5", "--methods", "divprune", "--timing-seconds", "0", "--out", str(out)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "Mean of each ability" in result.output
    assert "colours" in result.output
    assert "lower_resolution" in result.output
    found = json.loads((out / "results.json").read_text())
    assert found["cells"][0]["abilities"].keys() == {"colours", "pairs"}
    sentence = found["choice"]["sentence"]
    assert "the target" in sentence or "Nothing that was tried" in sentence
    for text in (result.output, (out / "tables.md").read_text()):
        assert " ".join(sentence.split()) in " ".join(text.split())


def stored(title, keep, flops, wrong):
    samples = [{"doc_id": item, "answer": "", "score": float(item not in wrong)} for item in range(40)]
    task = {"score": 1 - len(wrong) / 40, "higher_is_better": True, "samples": samples}
    tokens = {"visual_tokens_before": 64, "visual_tokens_after": 8}
    return {
        "method": title,
        "title": title,
        "keep": keep,
        "parameters": {},
        "label": title if keep is None else f"{title} keep={keep}",
        "tasks": {"t": task},
        "cost": {"flops": {"prefill_total": flops, "selection": 0.0}, **tokens, "kv_cache_bytes": 1},
    }


def test_the_cheapest_row_within_two_points_closes_the_tables():
    results = [
        stored("full", None, 100.0, ()),
        stored("divprune", 1.0, 100.0, ()),
        stored("divprune", 0.5, 60.0, ()),
        stored("divprune", 0.25, 30.0, ()),
        stored("divprune", 0.1, 10.0, range(4)),
        stored("lower_resolution", 0.25, 5.0, ()),
    ]
    choice = closing_choice(make_rows(results, {}))
    assert choice.line == 'vlmprune.apply(model, "divprune", keep=0.25)'
    assert choice.sentence.startswith("Saves 70 % of the FLOPs to the first token. On 12 items held out:")
    assert "at most 2 points of accuracy lost" in choice.sentence
    assert closing_choice(make_rows(results[1:], {})) is None
    assert closing_choice(make_rows(results[:2], {})) is None
    bad = closing_choice(make_rows([results[0], stored("divprune", 0.1, 10.0, range(20))], {}))
    assert bad.line == ""
    assert "Nothing that was tried meets" in bad.sentence
