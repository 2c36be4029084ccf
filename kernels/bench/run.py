"""Time the ops, each against its contenders, over the shapes of a device."""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Sequence
from itertools import product
from types import ModuleType

import torch

import vlmprune.kernels.bench.ops as ops_folder
from vlmprune.kernels.bench.case import HEAD_DIM, Case
from vlmprune.kernels.bench.machine import machine
from vlmprune.kernels.bench.timing import copy_bandwidth, medians_ms
from vlmprune.kernels.shared.implementation import choose_implementation

GPU_TOKENS, CPU_TOKENS, QUICK_TOKENS = (576, 1152, 2880, 11520, 32768), (576, 1152, 2880), (576, 2880)
SHARES = (0.05, 0.25)
# A baseline that would write more elements than this in one run is left out.
MOST_ELEMENTS = {"cpu": 2 * 10**9, "cuda": 2 * 10**11}
MOST_BYTES = {"cpu": 2**30, "cuda": 16 * 2**30}
FIELDS = (
    "op", "contender", "how", "batch", "tokens", "kept", "dim", "dtype", "median_ms", "runs", "bytes", "gb_per_s",
    "copy_share", "ours_is_faster_by", "checked", "device", "driver", "torch", "triton", "python", "threads", "date",
)  # fmt: skip

# A file of the folder is the benchmark of the op of its name: `plan(case)`, or several in `PLANS`, and `check(device)`.
OPS: dict[str, ModuleType] = {
    module.name: importlib.import_module(f"{ops_folder.__name__}.{module.name}")
    for module in pkgutil.iter_modules(ops_folder.__path__)
}


def cases(op: str, device: str, quick: bool) -> list[Case]:
    """The shapes of one op; on a CPU fp32 and one image, since that is what runs there."""
    if device == "cpu":
        chosen = [
            (1, n, share, 1024, torch.float32) for n in (QUICK_TOKENS if quick else CPU_TOKENS) for share in SHARES
        ]
        target = [Case(1, 2880, 640, 1024, torch.float32, device)]
    else:
        chosen = [
            (batch, n, share, 4096, dtype)
            for dtype in ((torch.bfloat16,) if quick else (torch.float16, torch.bfloat16))
            for batch in ((1,) if quick else (1, 8))
            for n in (QUICK_TOKENS if quick else GPU_TOKENS)
            for share in SHARES
        ]
        target = [Case(1, 2880, 288, 4096, torch.float16, device)]
    shapes = [Case(batch, n, max(1, round(share * n)), dim, dtype, device) for batch, n, share, dim, dtype in chosen]
    if op in (
        "row_attention",
        "received_attention",
        "attention_pagerank",
        "bipartite_match",
        "redistributed_attention",
    ):
        # Nothing is kept here: one shape per length.
        shapes = [Case(c.batch, c.tokens, 0, HEAD_DIM, c.dtype, device) for c in shapes[:: len(SHARES)]]
    return shapes + (target if op == "max_min" else [])


def bench(ops: Sequence[str], device: str, quick: bool, seconds: float) -> tuple[list[dict[str, object]], bool]:
    """Time the ops; return the table's rows and whether every op passed its check."""
    facts = machine(device)
    bandwidth = copy_bandwidth(device, seconds)
    print(f"{facts['device']}, copy bandwidth {bandwidth / 1e9:.1f} GB/s, ours = {choose_implementation(device)}")
    rows: list[dict[str, object]] = []
    all_passed = True
    for op in ops:
        torch.manual_seed(0)
        passed = OPS[op].check(device)
        all_passed &= passed
        if not passed:
            print(f"{op}: FAILED its check on this machine; no speed-up is given")
        plans = getattr(OPS[op], "PLANS", None) or (OPS[op].plan,)
        for case, plan in product(cases(op, device, quick), plans):
            torch.manual_seed(0)
            moved, contenders = plan(case)
            tried = [
                contender
                for contender in contenders
                if contender.elements <= MOST_ELEMENTS[device] and contender.peak_bytes <= MOST_BYTES[device]
            ]
            measured = medians_ms([contender.run for contender in tried], device, seconds)
            ours = measured[0][0] if tried and tried[0].name == "ours" else 0.0
            for contender, (median, runs) in zip(tried, measured, strict=True):
                row: dict[str, object] = {
                    "op": op, "contender": contender.name, "how": contender.how, "batch": case.batch,
                    "tokens": case.tokens, "kept": case.kept, "dim": case.dim, "dtype": str(case.dtype).split(".")[1],
                    "median_ms": f"{median:.4f}", "runs": runs, "bytes": moved,
                    "gb_per_s": f"{moved / median / 1e6:.1f}", "copy_share": f"{moved / median * 1e3 / bandwidth:.3f}",
                    "ours_is_faster_by": f"{median / ours:.2f}" if passed and ours and contender.name != "ours" else "",
                    "checked": "passed" if passed else "failed", **facts,
                }  # fmt: skip
                rows.append(row)
                faster = f"  ours {row['ours_is_faster_by']}x" if row["ours_is_faster_by"] else ""
                print(
                    f"{op:23}{contender.name:9}B{case.batch} N{case.tokens} K{case.kept} D{case.dim} {row['dtype']:9}"
                    f"{median:10.3f} ms{row['gb_per_s']:>9} GB/s {float(str(row['copy_share'])):6.1%} of copy{faster}"
                    f"{'  ' + contender.how if contender.how else ''}",
                    flush=True,
                )
    return rows, all_passed
