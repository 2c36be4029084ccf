"""The training of the shipped models: every stage runs, is resumed and ends in a checkpoint with its card."""

import re
import shlex
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("datasets")

from transformers import AutoModelForImageTextToText

from vlmprune.eval.training.common.losses import weighed
from vlmprune.eval.training.qwen import workshop as qwen_workshop
from vlmprune.eval.training.train import PIPELINES, parse, train
from vlmprune.eval.training.video import workshop as video_workshop


def two_steps(stage):
    """The stage with two steps on the smallest batches."""
    phases = []
    for phase in stage.phases:
        small = {"size": 1} if hasattr(phase.plan, "size") else {"tokens": 1}
        phases.append(replace(phase, steps=2, plan=replace(phase.plan, **small)))
    return replace(stage, phases=tuple(phases))


def shortened(pipeline):
    chains = tuple(tuple(tuple(map(two_steps, chain)) for chain in group) for group in pipeline.chains)
    return replace(pipeline, chains=chains)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    return tmp_path_factory.mktemp("training")


@pytest.mark.parametrize("name", PIPELINES)
def test_all_stages_and_the_card(name, runs, monkeypatch):
    real = qwen_workshop.fit_codes
    monkeypatch.setattr(qwen_workshop, "fit_codes", lambda: real(batches=1))
    fit_video = video_workshop.fit_codes
    monkeypatch.setattr(video_workshop, "fit_codes", lambda *parts: fit_video(*parts, batches=1))
    pipeline, threads = shortened(PIPELINES[name]), torch.get_num_threads()
    start = runs / pipeline.starts_from if pipeline.starts_from else None
    train(pipeline, runs / name, start=start, threads=1, limit=1)
    torch.set_num_threads(threads)
    model = AutoModelForImageTextToText.from_pretrained(runs / name / name)
    assert type(model).__name__ == pipeline.model_class
    card = (runs / name / name / "README.md").read_text()
    assert f"# {name}\n" in card
    assert all(f"| {stage.name} | {stage.steps} |" in card for stage in pipeline.stages.values())
    last = list(pipeline.stages.values())[-1]
    before = torch.load(runs / name / f"{last.name}.pt", weights_only=True)
    workshop = pipeline.workshop(runs / name, True, start)
    workshop.train(last)
    after = torch.load(runs / name / f"{last.name}.pt", weights_only=True)
    assert before["step"] == after["step"] == last.steps
    longer = replace(last, phases=(*last.phases[:-1], replace(last.phases[-1], steps=last.phases[-1].steps + 1)))
    workshop.train(longer)
    assert torch.load(runs / name / f"{last.name}.pt", weights_only=True)["step"] == last.steps + 1


def test_further_stages_go_on_from_a_checkpoint(runs, tmp_path):
    pipeline, threads = shortened(PIPELINES["tiny-llava-next"]), torch.get_num_threads()
    shipped = Path(__file__).parents[2] / "eval" / "checkpoints" / "tiny-llava-next"
    train(pipeline, tmp_path, threads=1, limit=1, weights=shipped)
    torch.set_num_threads(threads)
    before, after = (load_file(folder / "model.safetensors") for folder in (shipped, tmp_path / pipeline.name))
    learned = {name.split(".")[0] for name, value in before.items() if not torch.equal(value, after[name])}
    assert before.keys() == after.keys()
    assert learned == {"image_newline", "language_model", "multi_modal_projector"}
    assert "--weights CHECKPOINT" in (tmp_path / pipeline.name / "README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tiny-lava", "--out", "x"], "tiny-llava"),
        (["tiny-llava", "--out", "x", "--stage", "towel"], "tower_dense"),
        (["tiny-llava-next", "--out", "x"], "goes on from tiny-llava"),
        (["tiny-llava", "--out", "x", "--start", "y"], "not needed"),
        (["tiny-qwen2.5-vl-video", "--out", "x", "--weights", "y"], "for tiny-llava, tiny-llava-next, tiny-qwen2.5-vl"),
    ],
)
def test_wrong_arguments_are_named(arguments, words, capsys):
    with pytest.raises(SystemExit):
        parse(arguments)
    assert words in capsys.readouterr().err


def test_make_trains_every_model():
    root = Path(__file__).parents[2]
    plan = subprocess.run(["make", "-n", "tiny"], cwd=root, capture_output=True, text=True, check=True).stdout
    commands = re.findall(r"-m vlmprune\.eval\.training\.train (.*)", plan)
    assert [parse(shlex.split(command)).model for command in commands] == list(PIPELINES)


def test_weights_of_losses():
    losses = {"a": torch.tensor(1.0), "b": torch.tensor(10.0)}
    assert weighed(losses, {"b": 0.5}) == 6
