"""`latency` and `selection-cost` on a video, with every method that looks at time."""

import csv
import json

import pytest
from typer.testing import CliRunner

from support.tiny_configs import tiny_config
from vlmprune.cli import app
from vlmprune.eval.models import random_weights
from vlmprune.eval.speed import selection_command

METHODS = ["evs", "vidcom2", "flashvid", "holitom", "fastvid", "divprune"]
GIVEN = ["--random-weights", "tiny", "--methods", ",".join(METHODS), "--keep", "0.25", "--device", "cpu"]
VIDEO = ["--video-frames", "8", "--image-size", "64"]


@pytest.fixture(params=["qwen2_5_vl", "llava_onevision", "llava_next_video"])
def tiny(request, monkeypatch):
    """A tiny model in the presets' place."""
    for module in (random_weights, selection_command):
        monkeypatch.setattr(module, "preset_config", lambda _: tiny_config(request.param))
        monkeypatch.setattr(module, "preset_image_processor", lambda _: None)


def run(*arguments):
    result = CliRunner().invoke(app, list(arguments))
    assert result.exit_code == 0, result.output
    return result.output


def test_selection_cost(tiny, tmp_path):
    file = tmp_path / "cost.csv"
    run(
        "selection-cost",
        *GIVEN,
        *VIDEO,
        "--language-layers",
        "1",
        "--clock",
        "cpu",
        "--rounds",
        "2",
        "--out",
        str(file),
    )
    with file.open() as lines:
        rows = list(csv.DictReader(lines))
    assert [row["title"] for row in rows] == METHODS
    for row in rows:
        assert row["clock"] == "cpu"
        assert float(row["visual_tokens_after"]) < float(row["visual_tokens_before"])


def test_latency(tiny, tmp_path):
    run("latency", *GIVEN, *VIDEO, "--new-tokens", "2", "--seconds", "0", "--dtype", "float32", "--out", str(tmp_path))
    stored = json.loads((tmp_path / "latency.json").read_text())
    rows = stored["rows"] if isinstance(stored, dict) else stored
    assert [row["title"] for row in rows] == ["full", *METHODS]
    for row in rows[1:]:
        assert row["visual_tokens_after"] < row["visual_tokens_before"]
