"""Time every op against the ways people do the same today: `python -m vlmprune.kernels.bench`.

Needs torch, this package and, on a GPU, triton. For every op and shape one line per contender: "ours"; "torch", the
straightforward way; "official", the loop of the method's published code as its description has it; "library", a
well-kept library's op where one exists. Medians of many runs (CUDA events on a GPU, `perf_counter` on a CPU). Bytes are
what the op must move at least, and their rate is given as a share of the measured copy bandwidth. An op whose results
differ from a float64 computation on this machine gets no speed-up, and the exit status is 1.
"""

from __future__ import annotations

import argparse
import csv
import importlib.metadata
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.compact import compact
from vlmprune.kernels.implementation import choose_implementation
from vlmprune.kernels.max_min import max_min
from vlmprune.kernels.max_sum import max_sum
from vlmprune.kernels.merge_scatter import merge_scatter
from vlmprune.kernels.received_attention import received_attention
from vlmprune.kernels.row_attention import row_attention
from vlmprune.kernels.segmented_topk import segmented_topk

GPU_TOKENS, CPU_TOKENS, QUICK_TOKENS = (576, 1152, 2880, 11520, 32768), (576, 1152, 2880), (576, 2880)
SHARES = (0.05, 0.25)
HEADS, KV_HEADS, HEAD_DIM = 16, 4, 128
# A baseline that would write more elements than this in one run is left out.
MOST_ELEMENTS = {"cpu": 2 * 10**9, "cuda": 2 * 10**11}
MOST_BYTES = {"cpu": 2**30, "cuda": 16 * 2**30}
FIELDS = (
    "op", "contender", "how", "batch", "tokens", "kept", "dim", "dtype", "median_ms", "runs", "bytes", "gb_per_s",
    "copy_share", "ours_is_faster_by", "checked", "device", "driver", "torch", "triton", "python", "threads", "date",
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """One shape: `batch` segments of `tokens` tokens, of which `kept` are kept."""

    batch: int
    tokens: int
    kept: int
    dim: int
    dtype: torch.dtype
    device: str

    @property
    def offsets(self) -> list[int]:
        return [self.tokens * i for i in range(self.batch + 1)]

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, device=self.device, dtype=self.dtype)


@dataclass(frozen=True)
class Contender:
    """A way to compute an op: `elements` and `peak_bytes` are rough, and decide whether it is tried at all."""

    name: str
    how: str
    run: Callable[[], object]
    elements: float = 0
    peak_bytes: float = 0


Plan = tuple[int, list[Contender]]


def plan_segmented_topk(case: Case) -> Plan:
    scores = torch.randn(case.batch, case.tokens, device=case.device)
    flat, offsets, k = scores.flatten(), case.offsets, [case.kept] * case.batch
    return 4 * flat.numel() + 8 * case.batch * case.kept, [
        Contender("ours", "", lambda: segmented_topk(flat, offsets, k)),
        Contender("torch", "stable sort per image", lambda: [_stable(row, case.kept) for row in scores]),
        Contender("library", "torch.topk (ties undefined), sort", lambda: scores.topk(case.kept).indices.sort()),
    ]


def _stable(scores: Tensor, k: int) -> Tensor:
    return scores.sort(stable=True, descending=True).indices[:k].sort().values


def plan_max_min(case: Case) -> Plan:
    features = case.random(case.batch * case.tokens, case.dim)
    images = features.view(case.batch, case.tokens, case.dim)
    offsets, k = case.offsets, [case.kept] * case.batch
    matrix = case.batch * case.tokens**2
    moved = features.nbytes + 8 * matrix + 4 * case.batch * case.kept * case.tokens
    return moved, [
        Contender("ours", "", lambda: max_min(features, offsets, k)),
        Contender(
            "torch", "matrix and running minimum", lambda: [_running_minimum(x, case.kept) for x in images],
            matrix + 4 * case.batch * case.kept * case.tokens, 12 * case.tokens**2,
        ),
        Contender(
            "official", "minimum over all chosen rows at every step", lambda: [_all_rows(x, case.kept) for x in images],
            matrix + case.batch * case.tokens * case.kept**2 / 2, 12 * case.tokens**2,
        ),
    ]  # fmt: skip


def _distances(features: Tensor) -> Tensor:
    unit = features / features.norm(dim=-1, keepdim=True)
    return 1.0 - unit @ unit.T


def _running_minimum(features: Tensor, k: int) -> Tensor:
    distances = _distances(features.float())
    picks = torch.empty(k, dtype=torch.int64, device=features.device)
    picks[0] = distances.topk(2, dim=0, largest=False).values[1].argmax()
    nearest = distances[picks[0]]
    for i in range(1, k):
        picks[i] = nearest.argmax()
        nearest = torch.minimum(nearest, distances[picks[i]])
    return picks


def _all_rows(features: Tensor, k: int) -> Tensor:
    distances = _distances(features)
    picks = torch.empty(k, dtype=torch.int64, device=features.device)
    picks[0] = distances.topk(2, dim=0, largest=False).values[1].argmax()
    for i in range(1, k):
        chosen = distances.index_select(0, picks.gather(0, torch.arange(i, device=features.device)))
        picks[i] = chosen.amin(0).argmax()
    return picks


def plan_max_sum(case: Case) -> Plan:
    features = case.random(case.batch * case.tokens, case.dim)
    images = features.view(case.batch, case.tokens, case.dim)
    offsets, k, seeds = case.offsets, [case.kept] * case.batch, [0] * case.batch
    moved = features.nbytes + 8 * case.batch * case.tokens**2 + 4 * case.batch * case.kept * case.tokens
    return moved, [
        Contender("ours", "", lambda: max_sum(features, offsets, k, seeds)),
        Contender(
            "torch", "one product with the features per pick", lambda: [_summed(x, case.kept) for x in images],
            case.batch * case.kept * case.tokens * case.dim / 8, 4 * features.numel(),
        ),
    ]  # fmt: skip


def _summed(features: Tensor, k: int) -> Tensor:
    unit = functional.normalize(features.float(), dim=-1)
    picks = torch.zeros(k, dtype=torch.int64, device=features.device)
    total = unit @ unit[0]
    total[0] = torch.inf
    for i in range(1, k):
        pick = total.argmin()
        picks[i] = pick
        total += unit @ unit[pick]
        total[pick] = torch.inf
    return picks


def plan_row_attention(case: Case) -> Plan:
    query = case.random(case.batch, 1, HEADS, HEAD_DIM)
    key = case.random(case.batch, case.tokens, KV_HEADS, HEAD_DIM)
    rows = case.random(case.batch, HEADS, case.tokens, HEAD_DIM)

    def straightforward() -> Tensor:
        keys = key.repeat_interleave(HEADS // KV_HEADS, dim=2)
        scores = torch.einsum("brhd,blhd->brhl", query.float(), keys.float()) * HEAD_DIM**-0.5
        return scores.softmax(-1).mean(2)

    def eager() -> Tensor:
        keys = key.repeat_interleave(HEADS // KV_HEADS, dim=2).transpose(1, 2)
        weights = (rows @ keys.transpose(2, 3) * HEAD_DIM**-0.5).softmax(-1, dtype=torch.float32).to(case.dtype)
        return weights[:, :, -1].mean(1)

    square = case.batch * HEADS * case.tokens**2
    return key.nbytes + query.nbytes + 4 * case.batch * case.tokens, [
        Contender("ours", "", lambda: row_attention(query, key, reduce="mean")),
        Contender("torch", "einsum and softmax of the row", straightforward),
        Contender("official", "eager attention of all rows, last one taken", eager, 3 * square, 12 * square),
    ]


def plan_received_attention(case: Case) -> Plan:
    query = case.random(case.batch * case.tokens, HEADS, HEAD_DIM)
    key = case.random(case.batch * case.tokens, HEADS, HEAD_DIM)
    queries, keys = (x.view(case.batch, case.tokens, HEADS, HEAD_DIM).transpose(1, 2) for x in (query, key))
    square = case.batch * HEADS * case.tokens**2

    def straightforward() -> Tensor:
        scores = queries.float() @ keys.float().transpose(2, 3) * HEAD_DIM**-0.5
        return scores.softmax(-1).mean(2).mean(1)

    return query.nbytes + key.nbytes + 4 * case.batch * case.tokens, [
        Contender(
            "ours", "", lambda: received_attention(query, key, case.offsets), square if case.device == "cpu" else 0
        ),
        Contender("torch", "softmax of the whole matrix, mean", straightforward, 3 * square, 12 * square),
        Contender(
            "library", "scaled_dot_product_attention forward, same shape",
            lambda: functional.scaled_dot_product_attention(queries, keys, keys),
            square if case.device == "cpu" else 0,
        ),
    ]  # fmt: skip


def plan_compact(case: Case) -> Plan:
    planes = [
        case.random(case.batch, case.tokens, case.dim),
        torch.ones(case.batch, case.tokens, dtype=torch.int64, device=case.device),
        torch.arange(3 * case.batch * case.tokens, device=case.device).view(3, case.batch, case.tokens),
        case.random(case.batch, case.tokens, case.dim),
    ]
    index = torch.rand(case.batch, case.tokens, device=case.device).argsort(1)[:, : case.kept].sort(1).values
    rows = torch.arange(case.batch, device=case.device)[:, None]

    def gather() -> list[Tensor]:
        wide = index[..., None].expand(-1, -1, case.dim)
        return [
            planes[0].gather(1, wide),
            planes[1].gather(1, index),
            planes[2].gather(2, index.expand(3, -1, -1)),
            planes[3].gather(1, wide),
        ]

    moved = 2 * sum(plane.nbytes for plane in planes) * case.kept // case.tokens
    return moved, [
        Contender("ours", "", lambda: compact(planes, index, dims=[0, 0, 1, 0])),
        Contender("torch", "gather per plane", gather),
        Contender(
            "library", "advanced indexing per plane",
            lambda: [planes[0][rows, index], planes[1][rows, index], planes[2][:, rows, index], planes[3][rows, index]],
        ),
    ]  # fmt: skip


def plan_merge_scatter(case: Case) -> Plan:
    tokens, outputs = case.batch * case.tokens, case.batch * case.kept
    source, sizes = case.random(tokens, case.dim), torch.rand(tokens, device=case.device) + 0.5
    destination = torch.randint(0, outputs, (tokens,), device=case.device)

    def scatter() -> Tensor:
        wide = destination[:, None].expand(-1, case.dim)
        total = torch.zeros(outputs, device=case.device).scatter_reduce_(0, destination, sizes, "sum")
        weighted = torch.zeros(outputs, case.dim, device=case.device)
        weighted.scatter_reduce_(0, wide, source.float() * sizes[:, None], "sum")
        return (weighted / total[:, None]).to(case.dtype)

    return source.nbytes * (tokens + outputs) // tokens, [
        Contender("ours", "", lambda: merge_scatter(source, destination, sizes, outputs)),
        Contender("torch", "scatter_reduce of weighted tokens and sizes", scatter),
    ]


PLANS: dict[str, Callable[[Case], Plan]] = {
    "segmented_topk": plan_segmented_topk,
    "max_min": plan_max_min,
    "max_sum": plan_max_sum,
    "row_attention": plan_row_attention,
    "received_attention": plan_received_attention,
    "compact": plan_compact,
    "merge_scatter": plan_merge_scatter,
}


def check(op: str, device: str) -> bool:
    """Compare an op on ragged odd shapes with a float64 computation; features are signs, so that ties are exact."""
    torch.manual_seed(0)
    offsets, k = [0, 1, 64, 64, 641], [1, 16, 0, 100]
    lengths = [end - begin for begin, end in pairwise(offsets)]
    if op == "segmented_topk":
        scores = torch.randn(641).mul(4).round()
        parts = scores.split(lengths)
        ranked = [
            part.sort(stable=True, descending=True).indices[:count].sort().values
            for part, count in zip(parts, k, strict=True)
        ]
        return torch.equal(segmented_topk(scores.to(device), offsets, k).cpu(), torch.cat(ranked))
    if op in ("max_min", "max_sum"):
        features = torch.randint(0, 2, (641, 64)) * 2.0 - 1.0
        total = op == "max_sum"
        moved = features.half().to(device)
        found = max_sum(moved, offsets, k, [0] * 4) if total else max_min(moved, offsets, k)
        expected: list[int] = []
        for part, count in zip(features.double().split(lengths), k, strict=True):
            cosines = part @ part.T / 64
            alone = cosines.clone().fill_diagonal_(-torch.inf)
            picks = [0 if total else int(alone.amax(1).argmin())] if count else []
            while len(picks) < count:
                reach = cosines[picks].sum(0) if total else cosines[picks].amax(0)
                reach[picks] = torch.inf
                picks.append(int(reach.argmin()))
            expected += picks
        return found.tolist() == expected
    if op == "row_attention":
        query, key = torch.randn(2, 3, 4, 80), torch.randn(2, 577, 4, 80)
        expected_rows = (torch.einsum("brhd,blhd->brhl", query.double(), key.double()) * 80**-0.5).softmax(-1).mean(2)
        return _close(row_attention(query.to(device), key.to(device), reduce="mean"), expected_rows)
    if op == "received_attention":
        query, key = torch.randn(641, 2, 80), torch.randn(641, 2, 80)
        pairs = zip(query.double().split(lengths), key.double().split(lengths), strict=True)
        received = [(torch.einsum("qhd,khd->hqk", q, x) * 80**-0.5).softmax(-1).sum((0, 1)) / 2 for q, x in pairs]
        found = received_attention(query.to(device), key.to(device), offsets, reduce_queries="sum")
        return _close(found, torch.cat(received))
    if op == "compact":
        plane, index = torch.randn(2, 577, 33), torch.randint(-1, 577, (2, 63))
        expected_plane = plane[torch.arange(2)[:, None], index.clamp(min=0)].masked_fill((index < 0)[..., None], 0.0)
        return torch.equal(compact([plane.to(device)], index.to(device))[0].cpu(), expected_plane)
    source, sizes, destination = torch.randn(641, 33), torch.rand(641), torch.randint(0, 63, (641,))
    onto = functional.one_hot(destination, 63).T.double() * sizes.double()
    merged, total_size = merge_scatter(source.to(device), destination.to(device), sizes.to(device), 63)
    expected_merged = onto @ source.double() / onto.sum(1).clamp(min=1e-30)[:, None]
    return _close(merged, expected_merged) and _close(total_size, onto.sum(1))


def _close(found: Tensor, expected: Tensor) -> bool:
    return torch.allclose(found.cpu().double(), expected, atol=1e-5, rtol=1e-4)


def medians_ms(runs: Sequence[Callable[[], object]], device: str, seconds: float) -> list[tuple[float, int]]:
    """Median time in ms and number of runs of each callable, taken in turns so that a busy machine slows all alike.

    About `seconds` for each, at least three runs, after a warm-up.
    """
    counts = []
    for run in runs:
        run()
        _wait(device)
        begin = time.perf_counter()
        run()
        _wait(device)
        counts.append(max(3, min(200, int(seconds / max(1e-6, time.perf_counter() - begin)))))
    times: list[list[float]] = [[] for _ in runs]
    for turn in range(max(counts)):
        for i, run in enumerate(runs):
            if turn < counts[i]:
                times[i].append(_time_ms(run, device))
    return [(statistics.median(some), len(some)) for some in times]


def _time_ms(run: Callable[[], object], device: str) -> float:
    if device == "cuda":
        start, stop = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        run()
        stop.record()
        stop.synchronize()
        return float(start.elapsed_time(stop))
    begin = time.perf_counter()
    run()
    return (time.perf_counter() - begin) * 1e3


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def copy_bandwidth(device: str, seconds: float) -> float:
    """Bytes read and written a second by a copy too large for any cache."""
    source = torch.zeros(2**28 if device == "cuda" else 2**25, device=device)
    target = torch.empty_like(source)
    return 2 * source.nbytes / (medians_ms([lambda: target.copy_(source)], device, seconds)[0][0] * 1e-3)


def machine(device: str) -> dict[str, str]:
    """What the figures depend on: device, driver and versions."""
    facts = {
        "device": torch.cuda.get_device_name() if device == "cuda" else _cpu_name(),
        "driver": "",
        "torch": torch.__version__,
        "triton": "",
        "python": platform.python_version(),
        "threads": str(torch.get_num_threads()),
        "date": time.strftime("%Y-%m-%d"),
    }
    try:
        facts["triton"] = importlib.metadata.version("triton")
    except importlib.metadata.PackageNotFoundError:
        facts["triton"] = "not installed"
    if device == "cuda":
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        try:
            facts["driver"] = subprocess.run(query, capture_output=True, text=True, check=True).stdout.split()[0]
        except (OSError, subprocess.CalledProcessError, IndexError):
            facts["driver"] = "unknown"
    return facts


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())


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
    if op in ("row_attention", "received_attention"):
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
        passed = check(op, device)
        all_passed &= passed
        if not passed:
            print(f"{op}: FAILED its check on this machine; no speed-up is given")
        for case in cases(op, device, quick):
            torch.manual_seed(0)
            moved, contenders = PLANS[op](case)
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
                    f"{op:19}{contender.name:9}B{case.batch} N{case.tokens} K{case.kept} D{case.dim} {row['dtype']:9}"
                    f"{median:10.3f} ms{row['gb_per_s']:>9} GB/s {float(str(row['copy_share'])):6.1%} of copy{faster}",
                    flush=True,
                )
    return rows, all_passed


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line; returns 1 if an op failed its check."""
    parser = argparse.ArgumentParser(prog="python -m vlmprune.kernels.bench", description=str(__doc__).split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=list(PLANS), default=list(PLANS), help="ops to time (default: all)")
    parser.add_argument("--out", type=Path, help="CSV file to write")
    parser.add_argument("--quick", action="store_true", help="fewer shapes")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long to time each line")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here; use --device cpu")
    with torch.inference_mode():
        rows, all_passed = bench(options.ops, options.device, options.quick, options.seconds)
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, FIELDS)
            writer.writeheader()
            writer.writerows(rows)
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
