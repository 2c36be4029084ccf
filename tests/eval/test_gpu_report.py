"""`vlmprune gpu-report` in its CPU form: all kinds of steps, a failed one, going on."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from vlmprune.cli import app
from vlmprune.errors import ParameterError
from vlmprune.eval import gpu_report
from vlmprune.eval.gpu_report import GpuReportOptions, Step, plan, run_gpu_report


def test_every_kernel_and_method_has_a_step(tmp_path):
    steps, left_out = plan(GpuReportOptions(tmp_path, preset="llava-1.5-7b"), "cpu")
    kernels = [step for step in steps if step.name.startswith("kernel-")]
    assert [step.name.removeprefix("kernel-") for step in kernels] == list(gpu_report.OPS)
    named = {name for step in steps[len(kernels) :] for name in step.arguments[5].split(",")}
    assert {"fastervlm", "divprune", "fastv", "tome", "sparsevlm"} <= named
    assert {"evs", "hired"} & {item.title for item in left_out}
    with pytest.raises(ParameterError, match="max_mim"):
        plan(GpuReportOptions(tmp_path, ops=["max_mim"]), "cpu")


def test_a_failed_step_is_named_and_the_rest_is_done(tmp_path, monkeypatch):
    options = ["--preset", "llava-small", "--image-size", "112", "--device", "cpu", "--methods", "uniform"]
    arguments = ["gpu-report", "--out", str(tmp_path / "out"), *options]
    times = ("--kernel-seconds", "0.001", "--latency-seconds", "0.01", "--ops", "segmented_topk")
    real = plan

    def with_a_broken_step(*given):
        steps, left_out = real(*given)
        return [Step("kernel-broken", ("vlmprune.no_such_module",)), *steps], left_out

    monkeypatch.setattr(gpu_report, "plan", with_a_broken_step)
    result = CliRunner().invoke(app, [*arguments, *times])
    assert result.exit_code == 1
    assert "2 of 3 steps worked" in result.output
    assert "failed: kernel-broken" in result.output
    page = (tmp_path / "out" / "gpu-report.html").read_text()
    assert "No module named vlmprune.no_such_module" in page
    assert "<td>segmented_topk</td>" in page
    assert "<td>full (step 01)</td>" in page
    assert page.count("<td>uniform</td>") == 2
    found = json.loads((tmp_path / "out" / "gpu-report.json").read_text())
    assert found["device"]["torch"]

    monkeypatch.setattr(gpu_report, "plan", real)
    monkeypatch.setattr(gpu_report.subprocess, "run", lambda *args, **kwargs: pytest.fail("a step was done again"))
    again = CliRunner().invoke(app, [*arguments, *times])
    assert again.exit_code == 0
    assert "2 of 2 steps worked" in again.output


def test_a_step_that_takes_too_long_is_ended(tmp_path):
    options = GpuReportOptions(
        tmp_path / "out", preset="llava-small", device="cpu", methods=["uniform"], ops=["unmerge"], step_limit=0.01
    )
    outcomes = run_gpu_report(options)
    assert [outcome.problem for outcome in outcomes] == ["ended after 0.01 seconds"] * 2
