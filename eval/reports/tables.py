"""Tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from rich.table import Table

from vlmprune.eval.accuracy.against_baselines import Comparison
from vlmprune.eval.run.table_style import cost_style

from .summary import NOT_COUNTED, Row, interval

TASKS_A_TABLE = 5
FLOPS_UNITS = (("TFLOPs", 1e12), ("GFLOPs", 1e9), ("MFLOPs", 1e6))
MEMORY_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def accuracy_tables(rows: Sequence[Row]) -> list[Table]:
    """Accuracy by task, on average and relative to the unpruned model with its interval; five tasks a table."""
    names = list(rows[0].scores)
    shown = dict(zip(names, short_names(names), strict=True))
    parts = [names[start : start + TASKS_A_TABLE] for start in range(0, len(names), TASKS_A_TABLE)]
    return [_accuracy_table(rows, {name: shown[name] for name in part}) for part in parts]


def _accuracy_table(rows: Sequence[Row], names: Mapping[str, str]) -> Table:
    table = cost_style("Accuracy (%)")
    _identity(table)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in names.values():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mean", justify="right", style="bold")
    table.add_column("of full", justify="right", no_wrap=True)
    table.add_column("95 %", justify="right", no_wrap=True)
    for row, last in _with_breaks(rows):
        relative = "-" if row.relative is None else f"{100 * row.relative:.1f}%"
        scores = [f"{100 * score:.1f}" for score in (*(row.scores[name] for name in names), row.average)]
        table.add_row(row.title, row.keep_text, _count(row.after), *scores, relative, _interval(row), end_section=last)
    return table


def _interval(row: Row) -> str:
    low, high = interval(row)
    return "-" if low is None or high is None else f"{100 * low:.0f}-{100 * high:.0f}"


def cost_table(rows: Sequence[Row]) -> Table:
    """FLOPs by stage and measured times."""
    unit, divisor = flops_unit(max(row.prefill_flops for row in rows))
    memory, bytes_each = next(item for item in MEMORY_UNITS if rows[0].kv_cache_bytes >= item[1])
    table = cost_style(f"Cost of one request: {unit} to the first token, KV cache, ms at batch size 1")
    _identity(table)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in ("vision", "select", "LLM", "sum", f"KV {memory}", "prefill", "speed-up", "ms/token"):
        table.add_column(name, justify="right", no_wrap=True)
    full = next((row.prefill_ms for row in rows if row.is_full), None)
    for row, last in _with_breaks(rows):
        flops = row.flops
        selection = flops.get("selection", 0.0)
        total = three_figures(row.prefill_flops / divisor)
        stages = [
            three_figures(((flops["vision"] or 0.0) + (flops["projector"] or 0.0)) / divisor),
            NOT_COUNTED if selection is None else three_figures(selection / divisor),
            three_figures(((flops["prefill"] or 0.0) + (flops["head"] or 0.0)) / divisor),
            f">{total}" if selection is None else total,
        ]
        speed = f"{full / row.prefill_ms:.2f}x" if full and row.prefill_ms else "-"
        table.add_row(
            row.title,
            row.keep_text,
            tokens(row),
            *stages,
            three_figures(row.kv_cache_bytes / bytes_each),
            _milliseconds(row.prefill_ms),
            speed,
            _milliseconds(row.decode_ms),
            end_section=last,
        )
    return table


def baseline_table(comparisons: Sequence[Comparison]) -> Table:
    """Points of mean accuracy against each baseline, and whether the items tell the two apart."""
    table = cost_style("Against the baselines (points; + better, - worse, = not told apart by these items)")
    _identity(table)
    names = list(dict.fromkeys(comparison.baseline for comparison in comparisons))
    for name in names:
        table.add_column(name, justify="right", no_wrap=True)
    cells = {(c.method, c.keep, c.baseline): c for c in comparisons}
    shown = list(dict.fromkeys((c.method, c.keep) for c in comparisons))
    for place, (method, keep) in enumerate(shown):
        found = [cells.get((method, keep, name)) for name in names]
        last = place + 1 == len(shown) or shown[place + 1][0] != method
        table.add_row(method, f"{keep:g}", *map(_against, found), end_section=last)
    return table


def _against(comparison: Comparison | None) -> str:
    if comparison is None:
        return "-"
    marks = {"better": "+", "worse": "-", "a tie": "="}
    return f"{100 * comparison.difference:+.1f} {marks[comparison.verdict]}"


def as_markdown(table: Table) -> str:
    """The table for a README: title, header, rows."""
    columns = list(table.columns)
    lines = [[str(column.header) for column in columns], ["---" if c.justify == "left" else "---:" for c in columns]]
    lines += [list(map(str, cells)) for cells in zip(*(column.cells for column in columns), strict=True)]
    body = "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)
    return f"**{table.title}**\n\n{body}\n"


def _identity(table: Table) -> None:
    table.add_column("method", no_wrap=True, max_width=12)
    table.add_column("keep", justify="right", no_wrap=True)


def _with_breaks(rows: Sequence[Row]) -> Iterable[tuple[Row, bool]]:
    following = [*(row.title for row in rows[1:]), None]
    return ((row, row.title != after) for row, after in zip(rows, following, strict=True))


def short_names(names: Sequence[str]) -> list[str]:
    """Task names without a first part that all share (up to an underscore), cut at ten characters."""
    prefix = names[0][: names[0].rfind("_") + 1]
    shared = all(name.startswith(prefix) for name in names)
    return [(name.removeprefix(prefix) if shared else name)[:10] for name in names]


def tokens(row: Row) -> str:
    """Visual tokens before and after (averaged over layers and requests)."""
    return f"{_count(row.before)}>{_count(row.after)}"


def _count(value: float) -> str:
    return f"{value:.0f}" if abs(value - round(value)) < 0.05 or value >= 100 else f"{value:.1f}"


def flops_unit(largest: float) -> tuple[str, float]:
    """The unit in which `largest` FLOPs are a number of readable size, and its divisor."""
    return next(((name, size) for name, size in FLOPS_UNITS if largest >= size), FLOPS_UNITS[-1])


def three_figures(value: float) -> str:
    """`value` with three figures, at most three of them after the point."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.{1 if value >= 10 else 2 if value >= 1 else 3}f}"


def _milliseconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.1f}"
