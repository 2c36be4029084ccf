"""The benchmark on tiny shapes."""

import csv
from pathlib import Path

import pytest
import torch

from vlmprune.kernels.bench import __main__ as command
from vlmprune.kernels.bench import run as bench
from vlmprune.kernels.bench.case import Case
from vlmprune.kernels.bench.ops import max_min as max_min_bench

CASES = bench.cases


@pytest.fixture(autouse=True)
def tiny(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench, "cases", lambda op, device, quick: [Case(1, 20, 5, 16, torch.float32, device)])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device, seconds: 1e9)


def run(tmp_path: Path, *ops: str) -> tuple[int, list[dict[str, str]]]:
    out = tmp_path / "new" / "kernels.csv"
    status = command.main(["--device", "cpu", "--seconds", "0.001", "--out", str(out), "--ops", *ops])
    with out.open() as file:
        return status, list(csv.DictReader(file))


def test_every_op_of_the_folder_has_a_benchmark(ops: list[str]) -> None:
    assert sorted(bench.OPS) == ops


def test_every_op_is_checked_and_timed(tmp_path: Path) -> None:
    status, rows = run(tmp_path, *bench.OPS)
    assert status == 0
    assert {row["op"] for row in rows} == set(bench.OPS)
    for row in rows:
        assert row["checked"] == "passed"
        assert float(row["median_ms"]) > 0
        assert bool(row["ours_is_faster_by"]) == (row["contender"] != "ours")
        assert row["torch"] == torch.__version__
    assert {row["contender"] for row in rows if row["op"] == "max_min"} == {"ours", "torch", "official"}


def test_no_speed_up_for_an_op_that_is_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = max_min_bench.max_min
    monkeypatch.setattr(max_min_bench, "max_min", lambda *arguments, **options: right(*arguments, **options).flip(0))
    status, rows = run(tmp_path, "max_min", "compact")
    assert status == 1
    assert {row["checked"] for row in rows if row["op"] == "max_min"} == {"failed"}
    assert not any(row["ours_is_faster_by"] for row in rows if row["op"] == "max_min")
    assert any(row["ours_is_faster_by"] for row in rows if row["op"] == "compact")


def test_the_official_loop_picks_the_same_tokens() -> None:
    features = torch.randn(60, 16)
    expected = max_min_bench.max_min(features, [0, 60], [12])
    assert torch.equal(max_min_bench.all_rows(features, 12), expected)
    assert torch.equal(max_min_bench.running_minimum(max_min_bench.distances_of(features), 12), expected)
    weights = torch.rand(60) + 0.1
    expected = max_min_bench.max_min(features, [0, 60], [12], weights=weights)
    assert torch.equal(max_min_bench.weighted_minimum(max_min_bench.distances_of(features), weights, 12), expected)


def test_shapes_of_the_gpu_run() -> None:
    shapes = CASES("max_min", "cuda", False)
    assert {case.tokens for case in shapes} == {576, 1152, 2880, 11520, 32768}
    assert {case.batch for case in shapes} == {1, 8}
    assert {str(case.dtype) for case in shapes} == {"torch.float16", "torch.bfloat16"}
    assert any((case.tokens, case.kept, case.dim) == (2880, 288, 4096) for case in shapes)
