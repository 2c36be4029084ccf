"""Benchmarks of tasks on clips, alone and beside tasks on pictures: what runs, and what is refused before anything does."""

from __future__ import annotations

import io

import pytest

pytest.importorskip("lmms_eval")

from rich.console import Console

from vlmprune.errors import UnsupportedMethodError
from vlmprune.eval.accuracy.task_index import find_tasks
from vlmprune.eval.accuracy.task_scores import quiet_lmms_eval
from vlmprune.eval.bench import BenchOptions, run_bench, shown_modalities
from vlmprune.eval.dry_run import print_plan
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.run.cells import ALL, make_cells, parse_methods, usable_cells

CLIPS, PICTURES = "video_order", "scenes_existence"


def options(tmp_path, methods, tasks):
    return BenchOptions(
        "tiny-qwen2.5-vl", parse_methods(methods), [0.5], tasks, tmp_path / "out", limit=1, baselines=False,
        timing_seconds=0,
    )  # fmt: skip


def run(wanted):
    return run_bench(wanted, Console(file=io.StringIO()))


def test_what_tasks_show():
    with quiet_lmms_eval():
        tasks = find_tasks([CLIPS, PICTURES], "qwen2_5_vl")
    assert set(shown_modalities(tasks)) == {"image", "video"}
    assert shown_modalities({CLIPS: tasks[CLIPS]}) == ["video"]
    assert shown_modalities({PICTURES: tasks[PICTURES]}) == ["image"]

    class OfText:
        def has_test_docs(self):
            return True

        def test_docs(self):
            return [0, 1]

        def doc_to_visual(self, _):
            return None

    assert shown_modalities({"text": OfText()}) == []


def test_a_dry_run_of_clips_plans_methods_for_videos(tmp_path, capsys):
    assert print_plan(options(tmp_path, "evs,divprune", [CLIPS]), new_tokens=2) > 0
    assert "3 cells, 0 of them stored: full, evs keep=0.5, divprune keep=0.5" in capsys.readouterr().out


@pytest.mark.parametrize("go", [run, print_plan], ids=["bench", "dry run"])
@pytest.mark.parametrize("tasks", [[CLIPS, PICTURES], [PICTURES, CLIPS]], ids=["clips first", "pictures first"])
@pytest.mark.parametrize(
    ("methods", "message"),
    [
        ("evs", "'evs' does not serve images"),
        ("pixelprune", "'pixelprune' does not serve videos"),
        ("divprune,lower_resolution", "'lower_resolution' makes pictures smaller"),
    ],
)
def test_a_method_that_does_not_serve_every_task_is_refused_before_anything_runs(
    tmp_path, go, tasks, methods, message, monkeypatch
):
    monkeypatch.setattr("vlmprune.eval.accuracy.live_model.LiveModel._generate", lambda *_: pytest.fail("ran"))
    wanted = options(tmp_path, "divprune", tasks)
    wanted = BenchOptions(**{**vars(wanted), "methods": parse_methods(methods, smaller_pictures=True)})
    with pytest.raises(UnsupportedMethodError, match=message):
        go(wanted)
    assert not wanted.out.exists()


def test_clips_and_pictures_in_one_benchmark(tmp_path):
    full, pruned = run(options(tmp_path, "divprune", [CLIPS, PICTURES]))
    for row in (full, pruned):
        assert {name: task["items"] for name, task in row.result["tasks"].items()} == {CLIPS: 1, PICTURES: 1}


def test_of_all_methods_those_that_serve_one_kind_only_are_noted():
    model = load_model("tiny-qwen2.5-vl", "float32", "cpu").model
    methods = parse_methods(ALL)
    usable, left_out = usable_cells(model, make_cells(methods, [0.5], 0), methods, "image", "video")
    notes = {item.title: item.note for item in left_out}
    assert notes["evs"].startswith("evs: not served. 'evs' does not serve images")
    assert notes["pixelprune"].startswith("pixelprune: not served. 'pixelprune' does not serve videos")
    assert {"full", "divprune"} <= {cell.method for cell in usable}
    assert not {"evs", "pixelprune"} & {cell.method for cell in usable}
