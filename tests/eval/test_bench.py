"""The whole benchmark on a tiny random model and a local task: results, resume, errors."""

from __future__ import annotations

import csv
import io
import json
import re
import shutil

import pytest

pytest.importorskip("lmms_eval")

from rich.console import Console
from transformers import LlavaForConditionalGeneration

import vlmprune.eval.bench as bench_module
from vlmprune.errors import UnknownNameError, UnsupportedMethodError
from vlmprune.eval.bench import BenchOptions, run_bench
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.names import ModelLoadError
from vlmprune.eval.reports.plots import pareto_front
from vlmprune.eval.reports.summary import make_rows, relative_score
from vlmprune.eval.reports.tables import accuracy_tables, cost_table, paired_table, short_names, time_tables
from vlmprune.eval.run.figures import three_figures
from vlmprune.eval.run.result_folder import ResultFolderError


@pytest.fixture
def options(model_folder, task_folder, tmp_path):
    def make(**changes):
        given = {
            "model": str(model_folder),
            "methods": [("pool", {}), ("divprune", {})],
            "keeps": [0.5, 8],
            "tasks": ["toy"],
            "out": tmp_path / "out",
            "batch_size": 4,
            "limit": 4,
            "baselines": False,
            "task_folders": [str(task_folder)],
            "timing_seconds": 0.1,
        }
        return BenchOptions(**{**given, **changes})

    return make


def quiet() -> Console:
    return Console(file=io.StringIO())


def test_results_table_and_plot(options, capsys):
    rows = run_bench(options(), quiet())
    out = options().out
    assert [(row.title, row.keep) for row in rows] == [
        *(("full", None), ("pool", 0.5), ("pool", 8), ("divprune", 0.5), ("divprune", 8)),
    ]
    assert [row.after for row in rows] == [64, 30, 6, 32, 8]
    printed = capsys.readouterr().out
    assert max(len(line) for line in printed.splitlines() if "report.html" not in line) <= 100
    assert "divprune" in printed
    assert (out / "accuracy_vs_flops.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((out / "results.json").read_text())
    assert len(results["cells"]) == 5
    assert results["configuration"]["limit"] == 4
    assert results["machine"]["packages"]["transformers"]
    full, pool = results["cells"][:2]
    assert pool["cost"]["flops"]["vision"] == full["cost"]["flops"]["vision"]
    assert pool["cost"]["flops"]["prefill"] < full["cost"]["flops"]["prefill"]
    assert pool["cost"]["flops"]["prefill"] == 2 * pool["cost"]["macs"]["prefill"]
    assert pool["timing"]["prefill_ms"]["median"] > 0
    lines = list(csv.DictReader((out / "results.csv").open()))
    assert [line["method"] for line in lines] == ["full", "pool", "pool", "divprune", "divprune"]
    assert float(lines[1]["visual_tokens_after"]) == 30
    markdown = (out / "tables.md").read_text().splitlines()
    assert len({line.count("|") for line in markdown[2:9]}) == 1
    assert markdown[4].startswith("| full | - | 64 |")
    page = (out / "report.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert page.count("<td>divprune</td>") == 8
    deciding = page[page.index('class="deciding"') :]
    assert deciding[: deciding.index("</tr>")].count("<th>") == 9
    answers = json.loads(page.split('<script type="application/json">')[1].split("</script>")[0])
    assert len(answers) == 5 * 4
    assert answers[0][0].startswith("divprune")
    links = re.findall(r'href="(cells/[^"]+)"', page)
    assert len(links) == 5
    assert all((out / link).is_file() for link in links)
    assert "@media print" in page
    assert results["choice"] is None or results["choice"]["sentence"] in page
    assert "Run it again" in page
    stored = [json.loads(file.read_text()) for file in (out / "cells").iterdir()]
    assert [len(cell["tasks"]["toy"]["samples"]) for cell in stored] == [4] * 5


def test_an_interrupted_run_goes_on_where_it_was(options, monkeypatch):
    real, calls = bench_module.evaluate_tasks, []

    def interrupted(live, *args):
        calls.append(live.pruned)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(live, *args)

    monkeypatch.setattr(bench_module, "evaluate_tasks", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_bench(options(), quiet())
    assert len(list((options().out / "cells").glob("*.json"))) == 2
    rows = run_bench(options(), quiet())
    assert len(rows) == 5
    assert len(calls) == 3 + 3
    assert len(run_bench(options(), quiet())) == 5
    assert len(calls) == 6
    run_bench(options(keeps=[0.5, 8, 4]), quiet())
    assert len(calls) == 8


def test_another_configuration_is_not_mixed_in(options, toy, tmp_path, model_folder):
    run_bench(options(methods=[("pool", {})], keeps=[8], timing_seconds=0), quiet())
    for changes in ({"limit": 3}, {"seed": 1}, {"dtype": "bfloat16"}, {"tasks": ["toy_pair"]}):
        with pytest.raises(ResultFolderError, match="another configuration"):
            run_bench(options(methods=[("pool", {})], keeps=[8], timing_seconds=0, **changes), quiet())
    other = shutil.copytree(model_folder, tmp_path / "other")
    toy.model(seed=1).save_pretrained(other)
    with pytest.raises(ResultFolderError, match="fingerprint"):
        run_bench(options(model=str(other), methods=[("pool", {})], keeps=[8], timing_seconds=0), quiet())


def test_a_crash_is_raised_and_its_cell_is_not_stored(options, monkeypatch):
    def crash(*args, **kwargs):
        raise RuntimeError("no more memory")

    monkeypatch.setattr("transformers.LlavaForConditionalGeneration.generate", crash)
    with pytest.raises(RuntimeError, match="no more memory"):
        run_bench(options(), quiet())
    assert not (options().out / "cells").exists()


def test_unreadable_models_are_named(tmp_path, model_folder):
    with pytest.raises(UnknownNameError, match="tiny-lava"):
        load_model("tiny-lava")
    with pytest.raises(ModelLoadError, match="does not exist"):
        load_model(str(tmp_path / "nowhere"))
    with pytest.raises(ModelLoadError, match=r"no config\.json"):
        load_model(str(tmp_path))
    broken = shutil.copytree(model_folder, tmp_path / "broken")
    weights = next(broken.glob("*.safetensors"))
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(ModelLoadError, match="broken"):
        load_model(str(broken))
    weights.unlink()
    with pytest.raises(ModelLoadError, match="no weights"):
        load_model(str(broken))
    (broken / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match="cannot be read"):
        load_model(str(broken))
    with pytest.raises(ModelLoadError, match="hub model"):
        load_model("nobody/nothing-at-all")


def test_models_that_are_no_vision_language_models_are_refused(tmp_path, model_folder):
    folder = shutil.copytree(model_folder, tmp_path / "text")
    (folder / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(UnknownNameError, match="model type 'llama'"):
        load_model(str(folder))


def test_a_model_without_chat_template_or_with_missing_weights_is_refused(tmp_path, model_folder, toy):
    folder = shutil.copytree(model_folder, tmp_path / "silent")
    (folder / "chat_template.jinja").unlink()
    with pytest.raises(ModelLoadError, match="chat template"):
        load_model(str(folder))
    config = json.loads((folder / "config.json").read_text())
    config["text_config"]["num_hidden_layers"] += 1
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="tensors"):
        load_model(str(folder))


def test_unknown_dtypes_and_methods_are_refused_before_anything_is_written(options):
    with pytest.raises(UnknownNameError, match=r"dtype 'bf17'.*Did you mean 'bf16'"):
        run_bench(options(dtype="bf17"), quiet())
    assert not options().out.exists()


def test_methods_that_do_not_serve_the_model_are_refused_at_once(options, toy, tmp_path, model_folder):
    config = toy.config()
    config.vision_feature_select_strategy = "full"
    folder = shutil.copytree(model_folder, tmp_path / "with-cls")
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    with pytest.raises(UnsupportedMethodError, match="pool"):
        run_bench(options(model=str(folder)), quiet())
    assert not options().out.exists()


def test_budgets_out_of_reach_are_noted_and_the_rest_is_measured(options, capsys):
    methods = [("pool", {}), ("pyramiddrop", {}), ("fastv", {})]
    rows = run_bench(options(methods=methods, timing_seconds=0.1), quiet())
    out = options().out
    assert [(row.title, row.keep) for row in rows] == [
        *(("full", None), ("pool", 0.5), ("pool", 8), ("pyramiddrop", 0.5)),
    ]
    wanted = [
        ("fastv", 0.5, "not reachable", "nearest: keep=0.67"),
        ("pyramiddrop", 8, "not reachable", "nearest: keep=22"),
        ("fastv", 8, "not reachable", "nearest: keep=43"),
    ]
    left_out = json.loads((out / "results.json").read_text())["left_out"]
    assert [(item["title"], item["keep"], item["kind"]) for item in left_out] == [item[:3] for item in wanted]
    printed, markdown, page = (
        capsys.readouterr().out,
        (out / "tables.md").read_text(),
        (out / "report.html").read_text(),
    )
    for title, keep, _, nearest in wanted:
        for text in (printed, markdown, page):
            (line,) = [line for line in text.splitlines() if f"{title} keep={keep}: not reachable" in line]
            assert nearest in line
    assert len(run_bench(options(methods=methods, timing_seconds=0.1), quiet())) == 4


def test_relative_scores():
    full = {"a": {"score": 0.5, "higher_is_better": True}, "b": {"score": 2.0, "higher_is_better": False}}
    half = {"a": {"score": 0.25, "higher_is_better": True}, "b": {"score": 4.0, "higher_is_better": False}}
    assert relative_score(full, full) == 1
    assert relative_score(half, full) == 0.5
    zero = {"a": {"score": 0.0, "higher_is_better": True}}
    assert relative_score(zero, zero) is None


def test_pareto_front():
    assert pareto_front([(1, 1), (2, 2), (2, 1), (3, 2), (1, 1)]) == [True, True, False, False, True]


def test_tables_of_large_models_fit(options):
    results = [large_result("full", None), large_result("a-method-with-a-long-name:alpha=0.5", 0.05)]
    timing = {
        r["label"]: {
            "prefill_ms": {"median": 12345.6, "q25": 11000, "q75": 13000},
            "decode_ms_per_token": {"median": 123.4, "q25": 120, "q75": 125},
            "rounds": 3,
        }
        for r in results
    }
    rows = make_rows(results, timing)
    for table in (*accuracy_tables(rows), paired_table(rows), cost_table(rows), *time_tables(rows)):
        console = Console(file=io.StringIO(), width=100)
        console.print(table)
        text = console.file.getvalue()
        assert text.count("…") == 1
        assert len([line for line in text.splitlines() if line.strip()]) == (4 if "same" in text else 5)


def large_result(title, keep):
    samples = [{"doc_id": i, "score": float(i < 9 or keep is None)} for i in range(10)]
    stages = {"vision": 7e12, "projector": 4e10, "prefill": 2e13, "head": 3e8, "decode": 1e12, "prefill_total": 2.8e13}
    scores = {
        f"scenes_{n}": {"score": 0.9, "higher_is_better": True, "samples": samples}
        for n in ("attribute", "existence", "counting", "relation", "reading", "seventh_task")
    }
    cost = {"visual_tokens_before": 2880, "visual_tokens_after": 1440.4, "flops": stages, "kv_cache_bytes": 1.5e9}
    return {"label": title, "method": title, "title": title, "keep": keep, "tasks": scores, "cost": cost}


def test_names_and_numbers_are_short():
    assert short_names(["scenes_a", "scenes_b"]) == ["a", "b"]
    assert short_names(["scenes_reading"]) == ["reading"]
    assert short_names(["gqa", "pope"]) == ["gqa", "pope"]
    assert [three_figures(value) for value in (1234.5, 12.34, 1.234, 0.1234)] == ["1,234", "12.3", "1.23", "0.123"]
