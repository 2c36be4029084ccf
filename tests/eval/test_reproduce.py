"""`vlmprune reproduce` on a tiny model with a table of its own."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lmms_eval")

from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.errors import UnknownNameError
from vlmprune.eval.accuracy.task_index import declared_names, shipped_task_texts
from vlmprune.eval.published.reproduce import compare
from vlmprune.eval.published.tables import PublishedTableError, published_names, read_published


def test_shipped_tables_name_tasks_methods_and_sources():
    known = set(declared_names(shipped_task_texts()))
    for name in published_names():
        published = read_published(name)
        assert {benchmark.task for benchmark in published.benchmarks.values()} <= known
        assert all("arXiv" in row.source for row in published.rows)
        assert all(benchmark.prompt and benchmark.metrics for benchmark in published.benchmarks.values())


def test_nothing_is_claimed_that_was_not_run():
    published = read_published("llava-1.5-7b").chosen(["divprune"], ["GQA", "POPE"])
    rows = compare(published, [])
    assert [(row.method, row.benchmark, row.published) for row in rows] == [
        *(("full", "GQA", 61.96), ("full", "POPE", 85.84), ("divprune", "GQA", 56.85), ("divprune", "POPE", 86.02)),
    ]
    assert {row.measured for row in rows} == {None}
    with pytest.raises(UnknownNameError, match="fastervlm"):
        read_published("llava-1.5-7b").chosen(["fastervl"], [])
    with pytest.raises(UnknownNameError, match=r"llava-1\.5-7b"):
        read_published("llava-1.5-8b")


def test_published_beside_measured(model_folder, task_folder, tmp_path):
    table = tmp_path / "table.json"
    toy = {"task": "toy", "metrics": ["exact_match"], "scale": 100, "prompt": "the toy's"}
    rows = [
        {"method": "divprune", "keep": 8, "scores": {"Toy": 12.5}},
        {"method": "fastv", "keep": 0.5, "parameters": {"layer": 1}, "scores": {"Toy": 20, "Points": 3}},
    ]
    content = {
        "model": "nowhere",
        "benchmarks": {"Toy": toy, "Points": {**toy, "metrics": ["exact_match", "exact_match"], "scale": 1}},
        "tables": [{"source": "a paper", "full": {"Toy": 50}, "rows": rows}],
    }
    table.write_text(json.dumps(content))
    arguments = [
        "reproduce",
        "toy",
        "--table",
        str(table),
        "--model",
        str(model_folder),
        "--out",
        str(tmp_path / "out"),
    ]
    result = CliRunner().invoke(app, [*arguments, "--include-path", str(task_folder), "--batch-size", "3"])
    assert result.exit_code == 0, result.output
    assert "Published and measured" in result.output
    assert "Published by: a paper." in result.output
    found = json.loads((tmp_path / "out" / "reproduce.json").read_text())["rows"]
    assert [(row["method"], row["keep"], row["benchmark"]) for row in found] == [
        *(("full", "-", "Toy"), ("full", "-", "Points"), ("divprune", "8", "Toy")),
        *(("fastv:layer=1", "0.5", "Toy"), ("fastv:layer=1", "0.5", "Points")),
    ]
    stored = json.loads((tmp_path / "out" / "results.json").read_text())["cells"]
    scores = {cell["title"]: 100 * cell["average"] for cell in stored}
    for row in found:
        if row["benchmark"] == "Toy":
            assert row["measured"] == pytest.approx(scores[row["method"]])
            assert row["interval"][0] <= row["measured"] <= row["interval"][1]
            assert row["items"] == 6
    assert found[1]["published"] is None
    assert "not given" in (tmp_path / "out" / "reproduce.md").read_text()

    table.write_text("{}")
    with pytest.raises(PublishedTableError, match="no table of published results"):
        read_published("toy", table)
