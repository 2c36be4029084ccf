"""The throughput command: servers of several settings under rising load, one table of all."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

from vlmprune.errors import ParameterError
from vlmprune.eval.run.csv_lines import write_csv
from vlmprune.eval.run.machine import describe_machine
from vlmprune.eval.run.result_folder import ResultFolder, write_json

from .load import Level, run_level
from .metrics import VisualCounts, read_counts
from .prompts import Prompts
from .server_process import ServerError, ServerProcess, served_model
from .settings import Server
from .table import Row, csv_line, markdown, terminal_table

DYING_SECONDS = 2.0
"""How long a server that broke a connection off may take to be gone."""


@dataclass(frozen=True)
class ThroughputOptions:
    """What `run_throughput` measures.

    Attributes:
        prompts: the requests.
        concurrency: numbers of clients at once, in order.
        requests_per_client: how many requests each of them sends; the same for all, so that every load lasts.
        warm_up: requests to every server before the first that counts.
        timeout_seconds: when a request is given up.
        together: whether all servers run at the same time and take every load in turn; otherwise one after the other.
        out: folder for throughput.json, throughput.csv and throughput.md.
    """

    prompts: Prompts
    concurrency: Sequence[int] = (1, 2, 4, 8)
    requests_per_client: int = 4
    warm_up: int = 2
    timeout_seconds: float = 600.0
    together: bool = False
    out: Path | None = None


@dataclass(frozen=True)
class _Target:
    server: Server
    process: ServerProcess | None
    address: str
    model: str


def run_throughput(
    servers: Sequence[Server], name: str, options: ThroughputOptions, console: Console | None = None
) -> list[Row]:
    """Measure every server under every load, print the table, write the files; these hold what is done after every load.

    Args:
        servers: the settings; others are compared with the first.
        name: of the model, for the title.
        options: what is measured.
        console: where progress is told; stderr by default.

    Raises:
        ServerError: a server does not start, dies, answers with an error, or drops nothing although it should.
        ParameterError: two settings have the same name and budget.
        ResultFolderError: the folder holds something else.
    """
    console = console or Console(stderr=True)
    labels = [server.label for server in servers]
    if len(set(labels)) < len(labels):
        raise ParameterError(f"Settings of the same name: {', '.join(labels)}; each needs its own.")
    prompts = options.prompts
    sizes = ", ".join(f"{width}x{height}" for width, height in prompts.image_sizes)
    title = f"{name}, {prompts.images} picture(s) of {sizes}, {prompts.new_tokens} new tokens"
    configuration = {
        "kind": "throughput", "model": name, "settings": labels, **asdict(prompts),
        "concurrency": list(options.concurrency), "requests_per_client": options.requests_per_client,
        "together": options.together,
    }  # fmt: skip
    folder = ResultFolder(options.out, configuration) if options.out is not None else None
    measured: dict[tuple[str, int], Row] = {}
    rows: list[Row] = []
    for server, level, counts in _levels(servers, options, console):
        measured[server.label, level.concurrency] = _row(server, level, counts)
        rows = _compared(measured, labels, options.concurrency)
        if folder is not None:
            _write(folder.path, rows, title, configuration)
    output = Console(width=110)
    output.print(terminal_table(rows, title))
    if folder is not None:
        output.print(f"Written to {folder.path}", soft_wrap=True)
    return rows


def _levels(
    servers: Sequence[Server], options: ThroughputOptions, console: Console
) -> Iterator[tuple[Server, Level, VisualCounts | None]]:
    for group in [list(servers)] if options.together else [[server] for server in servers]:
        with ExitStack() as stack:
            targets = [_open(server, stack, console) for server in group]
            for target in targets:
                if options.warm_up:
                    # Far from the numbers that count, so that these pictures come in no measurement.
                    warm = [options.prompts.request(target.model, 10**6 + number) for number in range(options.warm_up)]
                    _run(target, warm, 1, options)
            first = 0
            for concurrency in options.concurrency:
                count = concurrency * options.requests_per_client
                for target in targets:
                    numbers = range(first, first + count)
                    console.print(f"{target.server.label}: {count} requests of {concurrency} clients", markup=False)
                    # A server may begin to count with the first picture.
                    before = read_counts(target.address) or VisualCounts(0.0, 0.0, 0.0)
                    level = _run(
                        target,
                        [options.prompts.request(target.model, number) for number in numbers],
                        concurrency,
                        options,
                    )
                    after = read_counts(target.address)
                    counts = after.since(before) if after is not None else None
                    _check_dropped(target.server, counts)
                    yield target.server, level, counts
                first += count


def _open(server: Server, stack: ExitStack, console: Console) -> _Target:
    if server.start is None:
        return _Target(server, None, server.address, server.model or served_model(server.address))
    console.print(f"{server.label}: starting a server", markup=False)
    start = time.monotonic()
    process = stack.enter_context(server.start())
    console.print(f"{server.label}: ready after {time.monotonic() - start:.1f} s", markup=False)
    return _Target(server, process, process.address, server.model or served_model(process.address))


def _run(target: _Target, requests: Sequence[dict[str, Any]], concurrency: int, options: ThroughputOptions) -> Level:
    try:
        return run_level(target.address, requests, concurrency, options.timeout_seconds)
    except ServerError as error:
        end = time.monotonic() + DYING_SECONDS
        while target.process is not None and time.monotonic() < end:
            target.process.check()
            time.sleep(0.05)
        said = f" It printed last:\n{target.process.tail()}" if target.process is not None else ""
        raise ServerError(
            f"{target.server.label} at {target.address}, {concurrency} client(s): {error}.{said}"
        ) from error


def _check_dropped(server: Server, counts: VisualCounts | None) -> None:
    if not server.must_drop:
        return
    if counts is None or not counts.images:
        raise ServerError(f"The server of {server.label} counts no pruned images, so it is not known to prune.")
    if counts.after >= counts.before:
        raise ServerError(
            f"The server of {server.label} dropped none of {counts.before:.0f} visual tokens. Ask with larger pictures "
            "(--image-size) or a smaller --keep."
        )


def _row(server: Server, level: Level, counts: VisualCounts | None) -> Row:
    known = counts is not None and counts.images > 0
    before, after = (counts.before / counts.images, counts.after / counts.images) if counts and known else (None, None)
    return Row(server.setting, server.keep, level, None, before, after)


def _compared(measured: dict[tuple[str, int], Row], labels: Sequence[str], concurrency: Sequence[int]) -> list[Row]:
    rows = []
    for label in labels:
        for clients in concurrency:
            row, base = measured.get((label, clients)), measured.get((labels[0], clients))
            if row is not None:
                faster = None
                if base is not None and label != labels[0]:
                    faster = row.level.requests_per_second / base.level.requests_per_second
                rows.append(Row(row.setting, row.keep, row.level, faster, row.visual_before, row.visual_after))
    return rows


def _write(folder: Path, rows: Sequence[Row], title: str, configuration: dict[str, Any]) -> None:
    machine = describe_machine()
    write_json(folder / "throughput.json", {"machine": machine, **configuration, "rows": [asdict(row) for row in rows]})
    write_csv(folder / "throughput.csv", [csv_line(row) for row in rows])
    (folder / "throughput.md").write_text(markdown(rows, title, machine), encoding="utf-8")
