"""Comparison with the unpruned model on prompts without labels."""

from __future__ import annotations

import io
import json
import math

import pytest
import torch

pytest.importorskip("lmms_eval")

from rich.console import Console

from vlmprune.errors import BudgetError, UnknownNameError
from vlmprune.eval import own_data
from vlmprune.eval.accuracy.answer_scores import SCORINGS, score_answer
from vlmprune.eval.accuracy.own_answers import Reply, agreement
from vlmprune.eval.accuracy.prompts import DEFAULT_PROMPT, PromptDataError, read_prompts
from vlmprune.eval.accuracy.request_records import RequestRecord
from vlmprune.eval.flops import VisionWork
from vlmprune.eval.models.loading import LoadedModel
from vlmprune.eval.own_data import FidelityOptions, run_fidelity, summarise_agreement
from vlmprune.eval.reports.html_page import write_report
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.run.result_folder import ResultFolderError

CELLS = [Cell(), Cell("uniform", 1.0), Cell("uniform", 2)]


@pytest.fixture
def prompts(toy, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(5):
        toy.image(i).save(folder / f"{i}.png")
        images = f"{i}.png" if i else ["0.png", "0.png"]
        lines.append(json.dumps({"image": images, "prompt": "what colour is the circle ?"}))
    (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n\n")
    return folder / "prompts.jsonl"


def run(toy, prompts, out, **changes):
    loaded = LoadedModel(toy.model(), toy.processor(), "toy")
    options = FidelityOptions(
        **{"data": prompts, "cells": CELLS, "out": out, "batch_size": 2, "new_tokens": 4, **changes}
    )
    return run_fidelity(loaded, options, Console(file=io.StringIO()))


def test_keeping_all_agrees_and_dropping_does_not(toy, prompts, tmp_path, capsys):
    whole, few = run(toy, prompts, tmp_path / "out")
    assert (whole.same_answer, whole.same_first_token, whole.kl) == (1, 1, 0)
    assert (whole.items, whole.visual_tokens, few.visual_tokens) == (5, (4 * 64 + 128) / 5, (4 * 2 + 4) / 5)
    assert few.kl > 1e-3
    assert few.kl_worst >= few.kl
    assert few.same_answer < 1
    printed = capsys.readouterr().out.splitlines()
    assert max(len(line) for line in printed if "report.html" not in line) <= 100
    assert len(json.loads((tmp_path / "out" / "fidelity.json").read_text())["rows"]) == 2
    assert (tmp_path / "out" / "fidelity.csv").read_text().count("\n") == 3


def test_budgets_that_a_picture_does_not_allow_are_noted(toy, prompts, tmp_path, capsys):
    fastv = Cell("fastv", 8)
    rows = run(toy, prompts, tmp_path / "out", cells=[*CELLS, fastv])
    assert [row.title for row in rows] == ["uniform", "uniform"]
    (item,) = json.loads((tmp_path / "out" / "fidelity.json").read_text())["left_out"]
    assert item["kind"] == "not reachable"
    assert item["reason"].endswith("nearest: keep=43, or a layer below the present layer=2.")
    assert "fastv keep=8: not reachable" in capsys.readouterr().out
    assert "fastv keep=8: not reachable" in write_report([tmp_path / "out"], tmp_path / "page.html").read_text()
    with pytest.raises(BudgetError, match="nearest: keep=43"):
        run(toy, prompts, tmp_path / "alone", cells=[Cell(), fastv])


def test_batch_sizes_agree(toy, prompts, tmp_path):
    singles = run(toy, prompts, tmp_path / "one", batch_size=1)
    batches = run(toy, prompts, tmp_path / "four", batch_size=4)
    for one, four in zip(singles, batches, strict=True):
        assert (one.same_answer, one.same_first_token) == (four.same_answer, four.same_first_token)
        assert four.kl == pytest.approx(one.kl, abs=1e-5)


def test_a_run_goes_on_and_does_not_mix(toy, prompts, tmp_path, monkeypatch):
    calls = []
    real = own_data.replies
    monkeypatch.setattr(own_data, "replies", lambda *args: calls.append(1) or real(*args))
    first = run(toy, prompts, tmp_path / "out")
    assert len(calls) == 1 + 2 * 3
    assert run(toy, prompts, tmp_path / "out") == first
    assert len(calls) == 7
    rows = run(toy, prompts, tmp_path / "out", cells=[Cell(), Cell("pool", 4)])
    assert len(calls) == 7 + 1 + 3
    assert [(row.title, row.keep) for row in rows] == [("pool", 4), ("uniform", 1.0), ("uniform", 2)]
    with pytest.raises(ResultFolderError, match="new_tokens"):
        run(toy, prompts, tmp_path / "out", new_tokens=5)
    toy.image(99).save(prompts.parent / "1.png")
    with pytest.raises(ResultFolderError, match="sha256"):
        run(toy, prompts, tmp_path / "out")


def test_divergence_is_that_of_the_definition():
    full = Reply(0, (1,), torch.tensor([0.5, 0.25, 0.25]).log())
    pruned = Reply(0, (1,), torch.tensor([0.25, 0.5, 0.25]).log())
    record = RequestRecord("", 0, 8, (2, 2), 5, 1, VisionWork(crops=1))
    result = summarise_agreement(Cell("pool", 2), agreement([full], [pruned], [record]))
    assert result.kl == result.kl_worst == pytest.approx(0.5 * math.log(2) - 0.25 * math.log(2))
    assert (result.same_answer, result.same_first_token, result.visual_tokens) == (1, 0, 2)


def test_a_kill_loses_one_batch(toy, prompts, tmp_path, monkeypatch):
    real, calls = own_data.replies, []

    def killed(live, batches, *args):
        calls.append(batches[0][0])
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(live, batches, *args)

    monkeypatch.setattr(own_data, "replies", killed)
    with pytest.raises(KeyboardInterrupt):
        run(toy, prompts, tmp_path / "out")
    rows = run(toy, prompts, tmp_path / "out")
    assert calls == [0, 0, 2, 0, 2, 4, 0, 2, 4]
    assert rows == run(toy, prompts, tmp_path / "whole")


def test_answers_are_scored_and_changed_ones_shown(toy, prompts, tmp_path, capsys):
    lines = [json.loads(line) for line in prompts.read_text().splitlines() if line]
    loaded = LoadedModel(toy.model(), toy.processor(), "toy")
    plain = run(toy, prompts, tmp_path / "plain")
    cell = json.loads((tmp_path / "plain" / "cells" / "full.json").read_text())
    said = [sample["answer"] for sample in cell["tasks"]["same_answer"]["samples"]]
    labelled = [{**line, "answer": answer or "none"} for line, answer in zip(lines, said, strict=True)]
    prompts.write_text("\n".join(map(json.dumps, labelled)))
    cells = [*CELLS, Cell("lower_resolution", 4)]
    options = FidelityOptions(prompts, cells, tmp_path / "out", batch_size=2, new_tokens=4, timing_seconds=0.01)
    rows = run_fidelity(loaded, options, Console(file=io.StringIO()))
    assert rows[0].accuracy == 1
    assert rows[1].accuracy < 1
    assert [row.same_answer for row in rows[:2]] == [row.same_answer for row in plain]
    low, high = rows[1].same_answer_95
    assert 0 <= low <= rows[1].same_answer < high < 1
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert [cell["tasks"]["answer"]["score"] for cell in results["cells"][:2]] == [1.0, 1.0]
    assert results["cells"][2]["cost"]["kv_cache_bytes"] < results["cells"][0]["cost"]["kv_cache_bytes"]
    assert results["cells"][2]["timing"]["prefill_ms"]["median"] > 0
    page = write_report([tmp_path / "out"], tmp_path / "page.html").read_text()
    assert "Changed answers" in page
    assert "data:image/jpeg;base64," in page
    printed = capsys.readouterr().out
    assert "full res." in printed
    assert " of " in printed


def test_scores_of_answers():
    assert score_answer("It is Red.", ["red"]) == 1
    assert score_answer("It is Red.", ["red"], scoring="exact") == 0
    assert score_answer(" Red!", ["blue", "red"], scoring="exact") == 1
    assert score_answer("reddish", ["red"], scoring="contains") == 0
    assert [score_answer(text, ["red"], ("blue", "red")) for text in ("(B) ", "B. red", "red", "A", "C", "")] == [
        *(1, 1, 1, 0, 0, 0),
    ]
    assert score_answer("invoce 12", ["invoice 12"], scoring="anls") == pytest.approx(0.9)
    assert score_answer("nothing", ["invoice 12"], scoring="anls") == 0
    with pytest.raises(UnknownNameError, match="--score 'f1'"):
        score_answer("a", ["a"], scoring="f1")
    assert len(SCORINGS) == 5


def test_folders_of_pictures(toy, tmp_path):
    for i in range(2):
        toy.image(i).save(tmp_path / f"{i}.PNG")
    assert [prompt.text for prompt in read_prompts(tmp_path)] == [DEFAULT_PROMPT] * 2
    (tmp_path / "prompts.txt").write_text("what ?\n\nwhere ?\n")
    assert [prompt.text for prompt in read_prompts(tmp_path, limit=3)] == ["what ?", "where ?", "what ?"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "no prompts"),
        ("{", "line 1 of"),
        ('{"image": "0.png"}', '"prompt": text'),
        ('{"prompt": "a", "answer": "b"}\n{"prompt": "a"}', "1 of 2 lines have no answer, prompt 2"),
        ('{"prompt": "a", "answer": "c", "choices": ["a", "b"]}', "allowed: one of its choices"),
        ('{"prompt": "a", "image": "0.png"}\n{"prompt": "a", "image": "missing.png"}', "line 2 of .*missing.png"),
    ],
)
def test_bad_files_are_named(toy, tmp_path, content, message):
    toy.image(0).save(tmp_path / "0.png")
    (tmp_path / "prompts.jsonl").write_text(content)
    with pytest.raises(PromptDataError, match=message):
        read_prompts(tmp_path / "prompts.jsonl")


def test_missing_data_is_named(tmp_path):
    with pytest.raises(PromptDataError, match="does not exist"):
        read_prompts(tmp_path / "nothing")
    with pytest.raises(PromptDataError, match="holds no pictures"):
        read_prompts(tmp_path)
