"""Time every op against the ways people do the same today: `python -m vlmprune.kernels.bench`.

Needs torch, this package and, on a GPU, triton. For every op and shape one line per contender: "ours"; "torch", the
straightforward way; "official", the loop of the method's published code as its description has it; "library", a
well-kept library's op where one exists. Medians of many runs (CUDA events on a GPU, `perf_counter` on a CPU). Bytes are
what the op must move at least, and their rate is given as a share of the measured copy bandwidth. An op whose results
differ from a float64 computation on this machine gets no speed-up, and the exit status is 1.

`--compile` times nothing: it compiles every kernel ahead of time and lists registers and spills.
"""

from __future__ import annotations

import argparse
import csv
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from vlmprune.kernels.bench.compilation import CAPABILITIES, compile_all
from vlmprune.kernels.bench.compilation import FIELDS as COMPILATION_FIELDS
from vlmprune.kernels.bench.run import FIELDS, OPS, bench
from vlmprune.kernels.shared.implementation import KernelUnavailableError


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if an op failed its check."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.kernels.bench", description=str(__doc__).split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=list(OPS), default=list(OPS), help="ops to time (default: all)")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long to time each line")
    parser.add_argument(
        "--compile", action="store_true", help="time nothing; compile all kernels ahead of time, GPU or not"
    )
    parser.add_argument(
        "--capabilities",
        nargs="+",
        type=int,
        default=list(CAPABILITIES),
        help="what to compile for (default: 80 90 100)",
    )
    options = parser.parse_args(arguments)
    if options.compile:
        try:
            return _compile(options.ops, options.capabilities, options.out)
        except KernelUnavailableError as error:
            parser.error(f"--compile: {error}")
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
    with torch.inference_mode():
        rows, all_passed = bench(options.ops, options.device, options.quick, options.seconds)
    _write(options.out, FIELDS, rows)
    return 0 if all_passed else 1


def _compile(ops: Sequence[str], capabilities: Sequence[int], out: Path | None) -> int:
    rows = compile_all(ops, capabilities)
    for row in rows:
        print(
            f"{row['op']:23}{row['kernel']:24}sm_{row['capability']:<5}{row['registers']:>4} registers"
            f"{row['spill_bytes']:>6} bytes spilled{row['shared_bytes']:>8} bytes shared{row['warps']:>3} warps  "
            f"{row['case']}{'  FAILED: ' + str(row['error']) if row['error'] else ''}"
        )
    _write(out, COMPILATION_FIELDS, rows)
    return 1 if any(row["error"] for row in rows) else 0


def _write(out: Path | None, fields: Sequence[str], rows: Sequence[dict[str, object]]) -> None:
    if out is None:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, fields)
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    sys.exit(main())
