"""Weights of heads: measured on pictures without labels, written, and ranked with."""

import json

import pytest
import torch
from typer.testing import CliRunner

import vlmprune
from vlmprune.cli import app
from vlmprune.eval.accuracy.prompts import PromptDataError
from vlmprune.eval.calibration.head_weights import CalibrationError, head_divergences, run_calibration
from vlmprune.eval.models.loading import LoadedModel


@pytest.fixture
def loaded(toy):
    return LoadedModel(toy.model(), toy.processor(), "toy")


@pytest.fixture
def pictures(toy, tmp_path):
    folder = tmp_path / "pictures"
    folder.mkdir()
    for number in range(2):
        toy.image(number).save(folder / f"{number}.png")
    return folder


def inputs_of(toy):
    return dict(toy.processor()(text=["USER : <image> what colour ?"], images=[toy.image(0)], return_tensors="pt"))


@pytest.mark.parametrize("layers", ["first", "all"])
def test_a_head_weighs_what_its_loss_changes(toy, layers):
    model, inputs = toy.model(), inputs_of(toy)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    found = head_divergences(model, inputs, layers)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    text = model.config.text_config
    width, decoder = text.hidden_size // text.num_attention_heads, model.model.language_model.layers
    behind = 3
    assert len(found) == text.num_attention_heads
    with torch.no_grad():
        whole = model(**inputs).logits[0, -behind:].double().log_softmax(-1)
        for head, divergence in enumerate(found):
            # A head whose columns of the output projection are 0 is out.
            for layer in decoder[: 1 if layers == "first" else None]:
                layer.self_attn.o_proj.weight[:, head * width : (head + 1) * width] = 0
            other = model(**inputs).logits[0, -behind:].double().log_softmax(-1)
            model.load_state_dict(before)
            expected = (whole.exp() * (whole - other)).sum(-1).mean()
            torch.testing.assert_close(divergence, expected, atol=1e-9, rtol=1e-4)


def test_the_file_is_what_hawk_takes(toy, loaded, pictures, tmp_path):
    out = tmp_path / "new" / "weights.json"
    result = run_calibration(loaded, pictures, out, None, "first")
    assert sum(result.head_weights) == pytest.approx(1)
    assert result == run_calibration(loaded, pictures, out, None, "first")
    assert run_calibration(loaded, pictures, out, 1, "first") != result
    run_calibration(loaded, pictures, out, None, "first")
    stored = json.loads(out.read_text())
    assert stored["data"]["prompts"] == 2
    assert stored["layers"] == "first"
    model, inputs = loaded.model, inputs_of(toy)
    with torch.no_grad(), vlmprune.pruned(model, "hawk", keep=4, head_weights=out):
        model(**inputs)
        kept = vlmprune.last_run(model).images[0].kept
    with torch.no_grad(), vlmprune.pruned(model, "hawk", keep=4, head_weights=result.head_weights):
        model(**inputs)
        assert torch.equal(vlmprune.last_run(model).images[0].kept, kept)


def test_what_cannot_be_measured_is_named(toy, loaded, tmp_path):
    with pytest.raises(PromptDataError, match="does not exist"):
        run_calibration(loaded, tmp_path / "nowhere", tmp_path / "out.json", None, "first")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "what colour ?"}\n')
    with pytest.raises(CalibrationError, match="must show a picture"):
        run_calibration(loaded, tmp_path / "prompts.jsonl", tmp_path / "out.json", None, "first")
    assert not (tmp_path / "out.json").exists()


def test_the_command(pictures, tmp_path):
    out = tmp_path / "weights.json"
    arguments = ["calibrate", "--model", "tiny-llava", "--data", str(pictures), "--out", str(out), "--limit", "1"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "heads, the heaviest: " in result.output
    assert len(json.loads(out.read_text())["head_weights"]) > 1
    result = CliRunner().invoke(app, [*arguments, "--layers", "last"])
    assert result.exit_code == 2
