"""`vlmprune tune` and `recommend` on live tiny models."""

from __future__ import annotations

import json

import pytest

pytest.importorskip("lmms_eval")

from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.errors import ParameterError
from vlmprune.eval.accuracy.task_index import find_tasks
from vlmprune.eval.accuracy.task_scores import quiet_lmms_eval
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.tune import live_trial
from vlmprune.eval.tune.run import paste_line
from vlmprune.eval.tune.task_items import task_items


@pytest.fixture
def data(toy, tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    lines = []
    for i in range(12):
        toy.image(i).save(folder / f"{i}.png")
        lines.append(json.dumps({"image": f"{i}.png", "prompt": "what colour is the circle ?", "answer": "red"}))
    (folder / "data.jsonl").write_text("\n".join(lines))
    return folder / "data.jsonl"


def test_tuning_chooses_what_keeps_the_answers_and_goes_on_without_measuring_again(toy, data, tmp_path, monkeypatch):
    model, processor, calls = toy.model(), toy.processor(), []
    real = live_trial.replies
    monkeypatch.setattr(live_trial, "replies", lambda *args: calls.append(1) or real(*args))
    given = {"methods": ["uniform"], "keeps": [1.0, 0.5, 2], "new_tokens": 3, "out": tmp_path / "out"}
    found = vlmprune.tune(model, processor, data, same_answers=0.98, **given)
    assert found.line == 'vlmprune.apply(model, "uniform", keep=1.0)'
    assert found.choice.confirmed
    assert not found.choice.sure
    assert found.choice.cost == pytest.approx(1.0)
    assert "held out: 100.0 % same answers" in found.sentence
    assert calls
    first, calls[:] = len(calls), []
    again = vlmprune.tune(model, processor, data, same_answers=0.98, **given)
    assert again == found
    assert len(calls) < first
    with pytest.raises(vlmprune.errors.NotAppliedError):
        vlmprune.remove(model)


def test_a_share_of_the_cache_is_kept_to(toy, data):
    found = vlmprune.tune(
        toy.model(), toy.processor(), data, kv_share=0.7, methods=["uniform", "pool"], keeps=[0.9, 0.25], new_tokens=2
    )
    assert found.choice.cell.keep == 0.25
    assert found.choice.cost < 1


def test_items_of_tasks_are_searched_by_the_score_of_the_task(model_folder, task_folder, tmp_path):
    arguments = ["tune", "--model", str(model_folder), "--tasks", "toy,toy_pair", "--include-path", str(task_folder)]
    small = ["--methods", "uniform", "--keep", "1.0,2", "--accuracy-drop", "0.9", "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(app, [*arguments, *small])
    assert result.exit_code == 0, result.output
    assert 'vlmprune.apply(model, "uniform", keep=' in result.output
    assert "On 4 items held out" in result.output
    assert set(json.loads((tmp_path / "out" / "configuration.json").read_text())["data"]["tasks"]) == {
        "toy",
        "toy_pair",
    }
    choices = CliRunner().invoke(app, [*arguments[:4], "toy_choice", *arguments[5:], "--accuracy-drop", "0.1"])
    assert choices.exit_code == 2
    assert "allowed here: generate_until" in choices.output
    assert CliRunner().invoke(app, arguments[:3]).exit_code == 2


def test_a_task_scores_its_answers(task_folder):
    with quiet_lmms_eval():
        items = task_items(find_tasks(["toy"], "llava", [str(task_folder)]), 2)
    assert [item.score("red") for item in items] == [1.0, 0.0]
    assert items[1].new_tokens == 4
    assert items[1].text == "is there a red ring ?"


def test_the_command_prints_the_line(model_folder, data, tmp_path):
    arguments = [
        "--methods",
        "uniform",
        "--keep",
        "1.0,2",
        "--new-tokens",
        "2",
        "--accuracy-drop",
        "0.9",
        "--limit",
        "10",
    ]
    result = CliRunner().invoke(app, ["tune", "--model", str(model_folder), "--data", str(data), *arguments])
    assert result.exit_code == 0, result.output
    assert 'vlmprune.apply(model, "uniform", keep=' in result.output
    assert "points of accuracy lost" in result.output
    refused = CliRunner().invoke(app, ["tune", "--model", "x", "--data", str(data), "--kl", "1", "--kv-share", "0.5"])
    assert refused.exit_code == 2
    assert "2 targets are named" in refused.output


def test_too_few_items_are_refused(toy, data):
    with pytest.raises(ParameterError, match="5 items are too few"):
        vlmprune.tune(toy.model(), toy.processor(), data, limit=5)


def test_lines_name_parameters():
    assert paste_line(Cell("fastv", 0.5, (("layer", 1),))) == 'vlmprune.apply(model, "fastv", keep=0.5, layer=1)'


def test_a_recommendation_says_that_it_is_a_guess(toy):
    model = toy.model()
    found = vlmprune.recommend(model)
    assert found.method in vlmprune.list_methods(model)
    assert found.line.startswith("vlmprune.apply(model, ")
    assert found.sentence.startswith("A first guess")
