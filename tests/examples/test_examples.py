"""The examples run as they stand, on the shipped models."""

from __future__ import annotations

import difflib
import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image, ImageDraw

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for number, (size, colour) in enumerate([((192, 192), "red"), ((256, 128), "blue"), ((96, 160), "green")]):
        image = Image.new("RGB", size, "grey")
        ImageDraw.Draw(image).ellipse([20, 20, 80, 80], fill=colour)
        image.save(folder / f"{number}.png")
    return folder


def run(*command):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([str(part) for part in command], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def script(name, *arguments):
    return run(sys.executable, EXAMPLES / name, *arguments)


def test_pruning_is_one_line_more(pictures):
    before, after = ((EXAMPLES / f"inference_{when}.py").read_text().split('"""')[2] for when in ("before", "after"))
    changes = [
        line for line in difflib.ndiff(before.splitlines(), after.splitlines()) if line[0] in "+-" and line[2:].strip()
    ]
    assert changes == ["+ import vlmprune", '+ vlmprune.apply(model, "divprune", keep=0.25)']
    question = "What color is the circle?"
    answers = [script(f"inference_{when}.py", pictures / "0.png", question).strip() for when in ("before", "after")]
    assert all(answers)


def test_captions_of_a_folder(pictures):
    lines = script("caption_folder.py", pictures).splitlines()
    assert [line.split("\t")[0] for line in lines] == ["0.png", "1.png", "2.png"]


def test_chat_holds_a_pruned_cache(pictures):
    lines = script("chat.py", pictures / "0.png").splitlines()
    held = [[int(word) for word in line.split("(")[1].split() if word.isdigit()] for line in lines if "held" in line]
    assert len(held) == 3
    assert all(kept == total - 432 for kept, total in held), "576 visual tokens, 144 of them kept"


def test_several_images_at_several_budgets(pictures):
    out = script("several_images.py", *sorted(pictures.glob("*.png")))
    assert out.count("keep=") == 3
    assert out.count("image:") == 9


def test_a_clip_spends_its_tokens_where_something_happens():
    sys.path.insert(0, str(EXAMPLES))
    try:
        import video
    finally:
        sys.path.pop(0)
    kept = video.main()
    assert len(kept) == 4
    assert kept[0] > 0
    assert kept[2] > 0
    assert kept[1] < kept[2], "nothing moves before the square appears"
    assert kept[3] < kept[2]


def test_tuning_names_a_line_to_paste(tmp_path):
    pytest.importorskip("lmms_eval")
    for number in range(10):
        image = Image.new("RGB", (192, 192), "grey")
        ImageDraw.Draw(image).ellipse([20, 20, 80 + 10 * number, 80], fill=("red", "blue")[number % 2])
        image.save(tmp_path / f"{number}.png")
    guess, sentence, line = script("tune.py", tmp_path).strip().splitlines()
    assert guess.startswith("first guess: vlmprune.apply(model, ")
    assert "held out" in sentence
    assert line.startswith("vlmprune.apply(model, ")


def test_lmms_eval_command(tmp_path):
    pytest.importorskip("lmms_eval")
    tasks = ["--include_path", ROOT / "eval" / "tasks", "--limit", "2", "--output_path", tmp_path]
    environment_bin = Path(sys.executable).parent
    path = f"{environment_bin}:{os.environ['PATH']}"
    command = [
        EXAMPLES / "lmms_eval.sh",
        ROOT / "eval" / "checkpoints" / "tiny-llava",
        "scenes_existence",
        "divprune",
        "0.25",
    ]
    done = subprocess.run(
        [str(part) for part in [*command, *tasks]],
        env={**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "scenes_existence" in done.stdout


def test_the_notebook_runs_from_top_to_bottom():
    nbclient, nbformat = pytest.importorskip("nbclient"), pytest.importorskip("nbformat")
    notebook = nbformat.read(EXAMPLES / "tour.ipynb", as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells), "shipped without outputs"
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert any("image/png" in output.get("data", {}) for output in outputs), "the figure is shown"
    text = "".join(output.get("text", "") for output in outputs)
    assert "image: 576 -> 58 (10 %)" in text
