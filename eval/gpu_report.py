"""`vlmprune gpu-report`: kernels, their benchmark and the latency of a whole model, step by step, on one page.

Every step is a process of its own, so that one that fails, hangs or loses the device takes no other with it.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

import vlmprune
from vlmprune.errors import ParameterError
from vlmprune.eval.models.loading import pick_device
from vlmprune.eval.models.random_weights import preset_config
from vlmprune.eval.reports.gpu_page import write_gpu_page
from vlmprune.eval.run.cells import LeftOut, make_cells, usable_cells
from vlmprune.eval.run.machine import describe_machine
from vlmprune.eval.run.result_folder import ResultFolder, read_json, write_json
from vlmprune.kernels.bench.machine import machine
from vlmprune.kernels.bench.run import OPS
from vlmprune.methods.registry import method_names

KEEPS = (0.25, 0.1)
METHODS_A_STEP = 5
STEP_LIMIT = 590.0
"""Seconds after which a step is ended and counted as failed."""
TAIL = 2000


@dataclass(frozen=True)
class GpuReportOptions:
    """What a report covers. `methods` and `ops` empty are all; `seconds` is about how long each thing is timed."""

    out: Path
    preset: str = "llava-1.5-7b"
    device: str = "auto"
    methods: Sequence[str] = ()
    ops: Sequence[str] = ()
    image_size: str = "336"
    kernel_seconds: float = 0.5
    latency_seconds: float = 120.0
    step_limit: float = STEP_LIMIT


@dataclass(frozen=True)
class Step:
    """One part of the report: its name, which is its folder's too, and the arguments of the Python process that does it."""

    name: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Outcome:
    """How a step ended: `problem` is empty where it worked."""

    step: str
    seconds: float
    problem: str


def run_gpu_report(options: GpuReportOptions, tell: Callable[[str], None] = lambda text: None) -> list[Outcome]:
    """Do every step that has not worked yet in `options.out`, and write gpu-report.html and gpu-report.json there.

    Raises:
        ParameterError: no step is asked for.
        ResultFolderError: the folder holds a report of something else, or another run has it.
        UnsupportedMethodError: a method asked for by name does not serve the preset.
    """
    device = str(pick_device(options.device)).split(":")[0]
    configuration = {
        "kind": "gpu-report",
        "preset": options.preset,
        "image_size": options.image_size,
        "machine": {key: value for key, value in machine(device).items() if key not in ("date", "threads")},
    }
    folder = ResultFolder(options.out, configuration)
    steps, left_out = plan(options, device)
    with folder.locked():
        outcomes = []
        for number, step in enumerate(steps, start=1):
            file = folder.path / "steps" / step.name / "outcome.json"
            stored = Outcome(**read_json(file)) if file.exists() else None
            if stored is None or stored.problem:
                tell(f"[{number}/{len(steps)}] {step.name}")
                stored = _done(step, file.parent, options.step_limit)
                write_json(file, asdict(stored))
                if stored.problem:
                    tell(f"failed: {step.name}: {stored.problem.splitlines()[-1]}")
            outcomes.append(stored)
        content: dict[str, Any] = {
            "machine": describe_machine(),
            "device": machine(device),
            "configuration": configuration,
            "steps": [asdict(outcome) for outcome in outcomes],
            "left_out": [item.note for item in left_out],
        }
        write_json(folder.path / "gpu-report.json", content)
        write_gpu_page(content, [folder.path / "steps" / step.name for step in steps], folder.path / "gpu-report.html")
    return outcomes


def plan(options: GpuReportOptions, device: str) -> tuple[list[Step], list[LeftOut]]:
    """The steps, and the methods that the preset cannot be served with."""
    unknown_ops = sorted(set(options.ops) - set(OPS))
    if unknown_ops:
        raise ParameterError(f"ops {', '.join(unknown_ops)}; allowed: {', '.join(OPS)}.")
    steps = [
        Step(
            f"kernel-{op}",
            (
                "vlmprune.kernels.bench",
                "--ops",
                op,
                "--quick",
                "--device",
                device,
                "--seconds",
                str(options.kernel_seconds),
            ),
        )
        for op in options.ops or OPS
    ]
    methods, left_out = served_methods(options)
    for start in range(0, len(methods), METHODS_A_STEP):
        part = methods[start : start + METHODS_A_STEP]
        latency = ("vlmprune", "latency", "--random-weights", options.preset, "--methods", ",".join(part))
        keeps = ",".join(map(str, KEEPS))
        size = ("--keep", keeps, "--image-size", options.image_size, "--device", device)
        number = start // METHODS_A_STEP + 1
        steps.append(Step(f"latency-{number:02}", (*latency, *size, "--seconds", str(options.latency_seconds))))
    return steps, left_out


def served_methods(options: GpuReportOptions) -> tuple[list[str], list[LeftOut]]:
    """Methods that reach one of the budgets on the preset, found on a model without memory behind it."""
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(preset_config(options.preset), dtype=torch.bfloat16)
    wanted: list[tuple[str, dict[str, Any]]] = [(name, {}) for name in options.methods or method_names()]
    cells, left_out = usable_cells(model.eval(), make_cells(wanted, KEEPS, 0), wanted, "image")
    return list(dict.fromkeys(cell.method for cell in cells if cell.is_pruned and cell.keep is not None)), left_out


def _done(step: Step, folder: Path, limit: float) -> Outcome:
    """Run a step; what it writes lies in its folder, what it prints in output.txt there."""
    folder.mkdir(parents=True, exist_ok=True)
    result = folder / ("latency" if "latency" in step.arguments else "kernels.csv")
    command = [sys.executable, "-m", *step.arguments, "--out", str(result)]
    root = str(Path(vlmprune.__file__).parents[1])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": path}
    start = time.monotonic()
    log = folder / "output.txt"
    with log.open("w", encoding="utf-8") as output:
        try:
            code = subprocess.run(
                command, stdout=output, stderr=subprocess.STDOUT, env=environment, timeout=limit
            ).returncode
            problem = f"exit status {code}" if code else ""
        except subprocess.TimeoutExpired:
            problem = f"ended after {limit:g} seconds"
    if problem:
        problem = f"{log.read_text(encoding='utf-8', errors='replace')[-TAIL:].strip()}\n{problem}".strip()
    return Outcome(step.name, time.monotonic() - start, problem)
