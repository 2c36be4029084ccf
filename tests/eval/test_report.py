from __future__ import annotations

import json

import pytest

from vlmprune.errors import UnknownNameError
from vlmprune.eval.reports.html_page import write_report
from vlmprune.eval.reports.models_compared import write_comparison
from vlmprune.eval.reports.plots import method_style, pareto_front
from vlmprune.eval.reports.stored_results import ReportError
from vlmprune.eval.reports.write import write
from vlmprune.eval.run.result_folder import ResultFolderError
from vlmprune.methods.registry import method_names

MACHINE = {
    "packages": {"torch": "2"}, "gpu": None, "cpu": "<fast>", "torch_threads": 1, "cpus": 2,
    "platform": "Linux", "vlmprune": "0.1", "date": "2026-01-01",
}  # fmt: skip
SPREAD = {"median": 1.5, "q25": 1.0, "q75": 2.0}
LATENCY = {
    "machine": MACHINE, "model": "m", "dtype": "float32", "device": "cpu", "text_tokens": 1, "new_tokens": 2,
    "rows": [
        {
            "title": "pool", "keep": 0.5, "batch_size": 1, "image_size": [9, 8],
            "visual_tokens_before": 64, "visual_tokens_after": 32, "kv_cache_bytes": 2**20,
            "peak_bytes": None, "ideal": None, "overhead": None, "selection": None,
            **dict.fromkeys(("vision", "prefill", "first_token", "decode_per_token", "end_to_end"), SPREAD),
        }
    ],
}  # fmt: skip
FIDELITY = {
    "machine": MACHINE,
    "configuration": {"model": {"source": "m"}, "data": {"prompts": 3}},
    "rows": [
        {
            "title": "pool", "keep": 4, "visual_tokens": 4.0, "same_answer": 0.5, "same_first_token": 1.0,
            "kl": 0.25, "kl_worst": 1.0,
        }
    ],
}  # fmt: skip


def test_runs_of_all_kinds_come_on_one_page(tmp_path):
    for name, content in {"latency": LATENCY, "fidelity": FIDELITY}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / f"{name}.json").write_text(json.dumps(content))
    page = write_report([tmp_path / "latency", tmp_path / "fidelity"], tmp_path / "deep" / "page.html").read_text()
    assert "2 (1-2)" in page
    assert "<td>9x8</td>" in page
    assert "<td>50.0</td>" in page
    assert "&lt;fast&gt;" in page
    assert "<fast>" not in page
    assert "http" not in page


def test_folders_without_results_and_damaged_files_are_named(tmp_path):
    with pytest.raises(ReportError, match="holds none of"):
        write_report([tmp_path], tmp_path / "page.html")
    (tmp_path / "latency.json").write_text("{")
    with pytest.raises(ResultFolderError, match=r"latency\.json"):
        write_report([tmp_path], tmp_path / "page.html")
    (tmp_path / "latency.json").write_text("{}")
    with pytest.raises(ReportError, match="no result file of vlmprune"):
        write_report([tmp_path], tmp_path / "page.html")
    assert not (tmp_path / "page.html").exists()


def bench_folder(folder, model, cells, against):
    cost = {"visual_tokens_after": 9.0, "flops": {"prefill_total": 2e9}, "kv_cache_bytes": 1.0}
    paired = {"difference": -0.1, "difference_95": [-0.2, 0.0], "ratio": 0.9, "ratio_95": [0.8, 1.0]}
    stored = [
        {
            "title": title, "keep": keep, "average": 0.8 * share, "tasks": {"a_b": {"score": 0.8 * share}}, "cost": cost,
            "paired": paired if keep else None,
        }
        for title, keep, share in cells
    ]  # fmt: skip
    pairs = [{"method": m, "baseline": b, "keep": k, "verdict": v} for m, b, k, v in against]
    content = {"configuration": {"model": {"source": model}}, "cells": stored, "against_baselines": pairs}
    folder.mkdir()
    (folder / "results.json").write_text(json.dumps(content))
    return folder


def test_several_models_in_one_table(tmp_path):
    against = [("good", "random", 0.5, "better"), ("good", "pool", 0.5, "better"), ("bad", "random", 0.5, "worse")]
    cells = [("full", None, 1.0), ("random", 0.5, 0.7), ("good", 0.5, 0.9), ("bad", 0.5, 0.6)]
    first = bench_folder(tmp_path / "a", "tiny-a", cells, against)
    second = bench_folder(tmp_path / "b", "hub/tiny-b", [("full", None, 1.0), ("good", 0.1, 0.4)], [])
    table = write_comparison([first, second], tmp_path / "table.md").read_text()
    assert table.splitlines()[2:] == [
        "| model | tiny-a | tiny-b |",
        "| --- | ---: | ---: |",
        "| keep | 0.5 | 0.1 |",
        "| `random` | 70 | not run |",
        "| `good` | **90** | 40 |",
        "| `bad` | *60* | not run |",
    ]


def test_a_folder_without_a_bench_is_no_row(tmp_path):
    with pytest.raises(ReportError, match=r"holds none of results.json"):
        write_comparison([tmp_path], tmp_path / "table.md")


def test_tables_and_plots_of_all_runs_below_a_folder(tmp_path):
    for name in ("one", "two"):
        bench_folder(tmp_path / name, f"m_{name}", [("full", None, 1.0), ("pool", 1.0, 0.9), ("pool", 1, 0.4)], [])
    (text,) = write([tmp_path], tmp_path / "table.tex")
    latex = text.read_text()
    assert latex.count("\\begin{tabular}") == 2
    assert "m\\_one" in latex
    assert "pool & 1.0 & 9 & 72.0 & 72.0 & $-10.0$ ($-20.0$ to $+0.0$) & 90.0 (80.0 to 100.0)" in latex
    assert "pool & 1 & 9 & 32.0" in latex
    for ending, first in ((".svg", b"<?xml"), (".pdf", b"%PDF"), (".png", b"\x89PNG")):
        files = write([tmp_path], tmp_path / f"plot{ending}")
        assert [file.name for file in files] == [f"plot-1{ending}", f"plot-2{ending}"]
        assert all(file.read_bytes().startswith(first) for file in files)
    with pytest.raises(UnknownNameError, match=r"ending of a report '\.doc'"):
        write([tmp_path], tmp_path / "a.doc")


def test_methods_look_the_same_everywhere_and_never_alike():
    styles = {name: method_style(name) for name in method_names()}
    assert len(set(styles.values())) == len(styles)
    assert method_style("fastv:layer=1") == styles["fastv"]


def test_the_front_ignores_what_is_within_the_error():
    assert pareto_front([(1, 50.0), (2, 50.5), (3, 60.0)], tolerance=1.0) == [True, False, True]
