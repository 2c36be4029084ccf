"""What goes wrong around a run: kills, bad pictures, misspelt methods, full disks; and what a run would do."""

from __future__ import annotations

import errno
import io
import json

import pytest
import typer

pytest.importorskip("lmms_eval")

from PIL import Image
from rich.console import Console

from vlmprune import cli
from vlmprune.errors import UnknownNameError
from vlmprune.eval.accuracy import live_model
from vlmprune.eval.accuracy.picture_check import check_prompts, check_tasks
from vlmprune.eval.accuracy.prompts import PromptDataError, read_prompts
from vlmprune.eval.accuracy.questions import PictureError, from_lmms_messages, to_image, user_turn
from vlmprune.eval.accuracy.task_index import find_tasks
from vlmprune.eval.bench import BenchOptions, run_bench
from vlmprune.eval.dry_run import print_plan
from vlmprune.method_files import check_names, named_in_files
from vlmprune.methods.registry import METHODS


@pytest.fixture
def options(model_folder, task_folder, tmp_path):
    def make(out="out", **changes):
        given = {
            "model": str(model_folder), "methods": [("pool", {})], "keeps": [8], "tasks": ["toy"], "out": tmp_path / out,
            "batch_size": 2, "limit": 6, "baselines": False, "task_folders": [str(task_folder)], "timing_seconds": 0,
        }  # fmt: skip
        return BenchOptions(**{**given, **changes})

    return make


def quiet():
    return Console(file=io.StringIO())


def test_a_kill_loses_one_batch(options, monkeypatch):
    real, calls = live_model.LiveModel._generate, []

    def killed(live, batch):
        calls.append([question.doc_id for question in batch])
        if len(calls) == 5:
            raise KeyboardInterrupt
        return real(live, batch)

    monkeypatch.setattr(live_model.LiveModel, "_generate", killed)
    with pytest.raises(KeyboardInterrupt):
        run_bench(options(), quiet())
    (log,) = (options().out / "unfinished").iterdir()
    with log.open("a") as file:
        file.write('[["torn line of a kill')
    rows = run_bench(options(), quiet())
    assert calls == [[0, 1], [2, 3], [4, 5], [0, 1], [2, 3], [2, 3], [4, 5]]
    whole = run_bench(options("whole"), quiet())
    for row, other in zip(rows, whole, strict=True):
        assert row.result["tasks"] == other.result["tasks"]
        assert row.result["cost"] == other.result["cost"]
    assert not list((options().out / "unfinished").iterdir())


def test_choices_are_logged_too(options):
    rows = run_bench(options(tasks=["toy_choice"]), quiet())
    assert rows[0].result["tasks"]["toy_choice"]["items"] == 6


def test_a_placeholder_in_the_text_is_no_second_picture(toy):
    picture = toy.image(0)
    kinds = lambda messages: [part.get("text", "image") for part in messages[0]["content"]]  # noqa: E731
    assert kinds(user_turn("a <image>\nb", [picture]).messages) == ["a", "image", "b"]
    assert kinds(user_turn("<image> b", [picture]).messages) == ["image", " b"]
    assert kinds(user_turn("<image> <image> b", [picture]).messages) == ["image", "b"]
    assert kinds(user_turn("<|vision_start|><|image_pad|><|vision_end|>b", [picture]).messages) == ["image", "b"]
    assert kinds(user_turn("say <image>", []).messages) == ["say"]
    content = [{"type": "text", "text": "<image> what"}, {"type": "image", "url": picture}]
    assert kinds(from_lmms_messages([{"role": "user", "content": content}]).messages) == ["image", " what"]


def test_bad_pictures_are_named_before_the_run(toy, tmp_path, monkeypatch):
    toy.image(0, (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "torn.png").write_bytes((tmp_path / "good.png").read_bytes()[:300])
    (tmp_path / "text.png").write_text("no picture")
    for name, message in (("torn", "torn.png' cannot be read"), ("text", "text.png' cannot be read")):
        (tmp_path / "data.jsonl").write_text(
            "\n".join(json.dumps({"image": f"{each}.png", "prompt": "what ?"}) for each in ("good", name))
        )
        with pytest.raises(PromptDataError, match=f"Item 2 .*{message}") as caught:
            check_prompts(read_prompts(tmp_path / "data.jsonl"))
        assert "\n" not in str(caught.value)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    with pytest.raises(PictureError, match=r"good\.png' is too large: Image size \(4096 pixels\)"):
        to_image(tmp_path / "good.png")


@pytest.mark.parametrize("value", ["7", '["a.png", 7]', '{"path": "a.png"}'])
def test_what_is_no_path_is_refused(tmp_path, value):
    (tmp_path / "data.jsonl").write_text(f'{{"image": {value}, "prompt": "what ?"}}')
    with pytest.raises(PromptDataError, match=r"line 1 of .*allowed: a path or a list of paths"):
        read_prompts(tmp_path / "data.jsonl")


def test_a_bad_picture_of_a_task_is_named_with_its_item(task_folder):
    tasks = find_tasks(["toy"], "llava", [str(task_folder)])
    check_tasks(tasks, 2)
    tasks["toy"].doc_to_visual = lambda doc: [7]
    with pytest.raises(PromptDataError, match="Task 'toy', item 0: A visual of type 'int'"):
        check_tasks(tasks, 2)


def test_names_are_known_without_importing_a_method():
    assert set(named_in_files()) == set(METHODS)
    check_names("pool, fastv:layer=1", ())
    with pytest.raises(UnknownNameError, match=r"'divprun'.*Did you mean 'divprune'"):
        check_names("pool,divprun:x=1")


def test_a_full_disk_is_one_line(capsys):
    with pytest.raises(typer.Exit) as caught, cli._clear_errors():
        raise OSError(errno.ENOSPC, "No space left on device", "plot.png")
    assert caught.value.exit_code == cli.USER_ERROR
    assert capsys.readouterr().err == "error: plot.png cannot be written: No space left on device\n"


def test_a_dry_run_writes_nothing_and_counts_what_is_stored(options, capsys):
    seconds = print_plan(options(keeps=[8, 4]))
    assert seconds > 0
    printed = capsys.readouterr().out
    assert "3 cells, 0 of them stored: full, pool keep=8, pool keep=4" in printed
    assert "6 items each: toy 6" in printed
    assert not options().out.exists()
