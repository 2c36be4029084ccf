"""What does not fit is refused with numbers, before it is loaded."""

from __future__ import annotations

import pytest
import torch
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.eval.models import loading, memory
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.memory import DeviceError, PeakMemory, free_memory, memory_need, parameter_count
from vlmprune.eval.models.random_weights import preset_config

GIB = 2**30


@pytest.fixture
def limit(monkeypatch):
    def set_to(gib: float) -> None:
        monkeypatch.setattr(memory, "free_memory", lambda device: int(gib * GIB))

    return set_to


def test_a_preset_that_does_not_fit_is_refused(limit, monkeypatch):
    limit(14)
    monkeypatch.setattr("vlmprune.eval.models.random_weights.build_random", lambda *args: pytest.fail("was built"))
    arguments = ["latency", "--random-weights", "qwen2.5-vl-7b", "--batch-size", "1,8", "--device", "cpu"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 2
    message = " ".join(result.stderr.split())
    assert "'qwen2.5-vl-7b' needs about" in message
    assert "15.4 GiB of weights in bfloat16" in message
    assert "8 prompts of 657 tokens" in message
    assert "14.0 GiB are free on cpu" in message


def test_a_folder_that_does_not_fit_is_refused_before_its_weights_are_read(limit, model_folder, monkeypatch):
    limit(0.0001)
    monkeypatch.setattr(
        loading.AutoModelForImageTextToText, "from_pretrained", lambda *a, **k: pytest.fail("was loaded")
    )
    for dtype, shown in (("auto", "float32"), ("bf16", "bfloat16")):
        with pytest.raises(DeviceError, match=rf"GiB of weights in {shown}.*0\.0 GiB are free on cpu"):
            load_model(str(model_folder), dtype, "cpu")


def test_a_hub_model_is_refused_by_its_configuration_alone(limit, toy, monkeypatch):
    limit(0.0001)
    monkeypatch.setattr(loading.AutoConfig, "from_pretrained", lambda source: toy.config())
    monkeypatch.setattr(loading.AutoProcessor, "from_pretrained", lambda source: pytest.fail("was loaded"))
    with pytest.raises(DeviceError, match="'someone/some-model' needs about"):
        load_model("someone/some-model", "auto", "cpu")


def test_what_fits_is_loaded(limit, model_folder):
    limit(1)
    assert load_model(str(model_folder), device="cpu").model is not None


def test_needs_grow_with_batch_picture_and_dtype():
    config = preset_config("qwen2-vl-2b")
    assert parameter_count(config) == 2208985600
    one = memory_need(config, torch.bfloat16, 1, (336, 336))
    assert one.weights == 2 * 2208985600
    assert one.cache == 2 * 28 * 2 * 128 * 2 * one.tokens
    four = memory_need(config, torch.float32, 4, (336, 336))
    assert (four.weights, four.cache) == (2 * one.weights, 8 * one.cache)
    assert memory_need(config, torch.bfloat16, 1, (672, 672)).activations > 2 * one.activations
    assert memory_need(config, torch.bfloat16, weights=5).weights == 5


def test_a_container_limit_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    without = free_memory(torch.device("cpu"))
    for name, text in {"max": "1000000", "current": "600000", "stat": "anon 1\ninactive_file 100000\n"}.items():
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_memory(torch.device("cpu")) == 500000
    (tmp_path / "memory.max").write_text("max\n")
    assert without is None or free_memory(torch.device("cpu")) > 500000


def test_the_peak_is_that_since_the_mark():
    peak = PeakMemory(torch.device("cpu"))
    peak.start()
    before = peak.read()
    if before is None:
        pytest.skip("this system does not tell")
    block = torch.ones(2**26)
    grown = peak.read()
    assert grown >= before + 0.9 * 4 * 2**26
    del block
    peak.start()
    assert peak.read() < grown
