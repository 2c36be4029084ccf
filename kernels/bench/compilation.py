"""Compile every kernel ahead of time for GPUs that this machine need not have: registers, spills, shared memory.

The launches of each op's `COMPILE_CASES` are made on CPU tensors under a driver that only knows its target, so that
triton derives signatures and specialisations as it would in a run, compiles, and launches nothing.
"""

from __future__ import annotations

import importlib
import pkgutil
import re
import subprocess
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import vlmprune.kernels
from vlmprune.kernels.shared.compile_cases import CompileCase
from vlmprune.kernels.shared.implementation import TRITON_FOUND, KernelUnavailableError, triton, triton_is_interpreted

CAPABILITIES = (80, 90, 100)
FIELDS = (
    "op", "case", "kernel", "capability", "registers", "spill_bytes", "shared_bytes", "warps", "seconds", "error", "triton"
)  # fmt: skip


class _TargetOnly:
    """What triton's just-in-time compiler asks a driver, answered for a GPU that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_device(self) -> int:
        # Triton keeps compiled kernels by device: one number a target.
        return self.capability

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> Any:
        return triton.backends.compiler.GPUTarget("cuda", self.capability, 32)


def compile_cases(ops: Sequence[str]) -> dict[str, Sequence[CompileCase]]:
    """Return the `COMPILE_CASES` of each op's file."""
    return {op: importlib.import_module(f"vlmprune.kernels.{op}").COMPILE_CASES for op in ops}


def all_ops() -> list[str]:
    """Return the ops of the folder."""
    return sorted(module.name for module in pkgutil.iter_modules(vlmprune.kernels.__path__))


def compile_all(ops: Sequence[str], capabilities: Sequence[int]) -> list[dict[str, object]]:
    """Compile the kernels that the cases of the ops launch; return one row a kernel and target.

    A kernel that several cases launch alike is listed once. A failure is a row with its error.

    Raises:
        KernelUnavailableError: triton is missing, or interprets kernels.
    """
    if not TRITON_FOUND or triton_is_interpreted():
        raise KernelUnavailableError("compiling needs triton, imported without TRITON_INTERPRET=1.")
    rows: list[dict[str, object]] = []
    for capability in capabilities:
        seen: set[str] = set()
        for op, cases in compile_cases(ops).items():
            for case in cases:
                facts = {"op": op, "case": case.name, "capability": capability, "triton": triton.__version__}
                rows += [{**dict.fromkeys(FIELDS, ""), **facts, **found} for found in _compile(case, capability, seen)]
    return rows


def _compile(case: CompileCase, capability: int, seen: set[str]) -> list[dict[str, object]]:
    found: list[dict[str, object]] = []

    def compile_only(kernel: Any, grid: Any) -> Any:
        def warm_up(*arguments: Any, **options: Any) -> None:
            begin = time.perf_counter()
            name = kernel.fn.__name__
            try:
                compiled = kernel.warmup(*arguments, grid=grid, **options)
            # Triton and ptxas raise many kinds of errors; each is a row of the table.
            except Exception as error:
                found.append({"kernel": name, "error": f"{type(error).__name__}: {error}".strip()})
                return
            if compiled.hash not in seen:
                seen.add(compiled.hash)
                seconds = f"{time.perf_counter() - begin:.2f}"
                found.append({"kernel": name, "seconds": seconds, **_resources(compiled)})

        return warm_up

    with _launches_replaced(_TargetOnly(capability), compile_only):
        try:
            case.call()
        except Exception as error:
            found.append({"kernel": "", "error": f"{type(error).__name__}: {error}".strip()})
    return found


@contextmanager
def _launches_replaced(driver: _TargetOnly, compile_only: Any) -> Iterator[None]:
    kernel_class = triton.runtime.jit.JITFunction
    before = kernel_class.__dict__.get("__getitem__")
    active = triton.runtime.driver._active
    triton.runtime.driver.set_active(driver)
    kernel_class.__getitem__ = compile_only
    try:
        yield
    finally:
        if before is None:
            del kernel_class.__getitem__
        else:
            kernel_class.__getitem__ = before
        triton.runtime.driver.set_active(active)


def _resources(compiled: Any) -> dict[str, object]:
    """Return what the machine code of a compiled kernel takes; a stack is where registers were spilled to."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "kernel.cubin"
        path.write_bytes(compiled.asm["cubin"])
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    usage = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": usage["REG"],
        "spill_bytes": usage["STACK"] + usage["LOCAL"],
        "shared_bytes": compiled.metadata.shared,
        "warps": compiled.metadata.num_warps,
    }
