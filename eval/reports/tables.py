"""Tables for a terminal of 100 columns."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from rich.table import Table

from vlmprune.eval.accuracy.against_baselines import Comparison
from vlmprune.eval.accuracy.suites import Suite, ability_means
from vlmprune.eval.run.figures import keep_text, percent, three_figures, with_quartiles
from vlmprune.eval.run.table_style import cost_style

from .summary import NOT_COUNTED, Row

TASKS_A_TABLE = 5
NO_INTERVAL = "no pairs"
WIDE = 0.1
"""From this width on an interval carries no digit after the point."""
FLOPS_UNITS = (("TFLOPs", 1e12), ("GFLOPs", 1e9), ("MFLOPs", 1e6))
MEMORY_UNITS = (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10), ("B", 1))


def accuracy_tables(rows: Sequence[Row]) -> list[Table]:
    """Accuracy by task, on average and relative to the unpruned model; five tasks a table."""
    names = list(rows[0].scores)
    shown = dict(zip(names, short_names(names), strict=True))
    parts = [names[start : start + TASKS_A_TABLE] for start in range(0, len(names), TASKS_A_TABLE)]
    return [_accuracy_table(rows, {name: shown[name] for name in part}) for part in parts]


def _accuracy_table(rows: Sequence[Row], names: Mapping[str, str]) -> Table:
    seeds = max(len(row.seeds) for row in rows)
    table = cost_style(
        ("Same answers (%)" if "same_answer" in names else "Accuracy (%)")
        + (f"; random: mean of {seeds} seeds (lowest to highest)" if seeds else "")
    )
    _identity(table, 12)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in names.values():
        table.add_column(name, justify="right", no_wrap=True)
    table.add_column("mean", justify="right", style="bold", no_wrap=True)
    table.add_column("of full", justify="right", no_wrap=True)
    for row, last in _with_breaks(rows):
        scores = [percent(row.scores[name]) for name in names]
        spread = f" ({percent(min(row.seeds), 0)}-{percent(max(row.seeds), 0)})" if row.seeds else ""
        average = percent(row.average) + spread
        table.add_row(row.title, row.keep_text, _count(row.after), *scores, average, _of_full(row), end_section=last)
    return table


def ability_table(rows: Sequence[Row], suites: Sequence[Suite]) -> Table | None:
    """Mean accuracy over the tasks of each ability; None without suites."""
    names = list(ability_means(suites, rows[0].scores))
    if not names:
        return None
    table = cost_style("Mean of each ability (%)")
    _identity(table, 16)
    for name in names:
        table.add_column(name, justify="right", overflow="fold")
    for row, last in _with_breaks(rows):
        means = ability_means(suites, row.scores)
        table.add_row(row.title, row.keep_text, *(percent(means[name]) for name in names), end_section=last)
    return table


def _of_full(row: Row) -> str:
    """The ratio of the means; without scores of items, of the tasks' scores."""
    if row.is_full:
        return "100.0%"
    paired = row.paired or {}
    if paired.get("ratio") is not None:
        return f"{percent(paired['ratio'])}%"
    return "full is 0" if "ratio" in paired else NO_INTERVAL


def paired_table(rows: Sequence[Row]) -> Table | None:
    """Every row against the unpruned model on the same items: points, ratio, their intervals, items that changed."""
    pruned = [row for row in rows if row.paired is not None]
    if not pruned:
        return None
    items = max((row.paired or {}).get("items", 0) for row in pruned)
    table = cost_style(
        f"Against the unpruned model on the same {items} items (95 % intervals that hold for small samples)"
    )
    _identity(table)
    for name in ("points", "95 %", "of full %", "95 % ", "better", "worse", "full res. %"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, last in _with_breaks(pruned):
        hard = f"{percent(row.hard[0], 0)} of {row.hard[1]}" if row.hard else "not known"
        table.add_row(row.title, row.keep_text, *paired_texts(row.paired or {})[:-1], hard, end_section=last)
    return table


def paired_texts(paired: Mapping[str, Any]) -> list[str]:
    """Difference and ratio with their intervals, better, worse and all items; words where there is none."""
    if "reason" in paired:
        return [paired["reason"], *[""] * 6]
    if "difference_95" not in paired or "ratio_95" not in paired:
        return ["of an older version: run it again", *[""] * 6]
    low, high = paired["difference_95"]
    ratio = "full is 0" if paired["ratio"] is None else percent(paired["ratio"])
    if paired["ratio_95"] is None:
        between = "no finite one" if "told from 0" in paired["ratio_reason"] else "mixed tasks"
    else:
        digits = 0 if paired["ratio_95"][1] - paired["ratio_95"][0] >= WIDE else 1
        between = " to ".join(percent(value, digits) for value in paired["ratio_95"])
    if paired["ratio"] is None and between == "mixed tasks":
        ratio = "none"
    places = 0 if high - low >= WIDE else 1
    return [
        f"{100 * paired['difference']:+.1f}",
        f"{100 * low:+.{places}f} to {100 * high:+.{places}f}",
        ratio,
        between,
        *(str(paired[name]) for name in ("better", "worse", "items")),
    ]


def cost_table(rows: Sequence[Row]) -> Table:
    """FLOPs by stage and bytes of the cache, counted."""
    unit, divisor = flops_unit(max(row.prefill_flops for row in rows))
    memory, bytes_each = next(item for item in MEMORY_UNITS if rows[0].kv_cache_bytes >= item[1])
    table = cost_style(f"Cost of one request: {unit} to the first token, KV cache")
    _identity(table)
    table.add_column("tokens", justify="right", no_wrap=True)
    for name in ("vision", "select", "LLM", "sum", f"KV {memory}"):
        table.add_column(name, justify="right", no_wrap=True)
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
        cache = three_figures(row.kv_cache_bytes / bytes_each)
        table.add_row(row.title, row.keep_text, tokens(row), *stages, cache, end_section=last)
    return table


def time_tables(rows: Sequence[Row]) -> list[Table]:
    """Measured times, a table a batch size: medians with quartiles over rounds and requests."""
    sizes = list(dict.fromkeys(size for row in rows for size in batches_of(row.times)))
    return [_time_table(rows, size) for size in sizes]


def batches_of(times: Mapping[str, Any]) -> dict[str, Any]:
    """Times by batch size; a file of an older version has those of batch size 1 alone."""
    found: dict[str, Any] = times.get("batches") or ({"1": times} if times else {})
    return found


def _time_table(rows: Sequence[Row], size: str) -> Table:
    measured = [row for row in rows if size in batches_of(row.times)]
    first = batches_of(measured[0].times)[size]
    table = cost_style(
        f"Times at batch size {size}: ms, medians (quartiles) over {first['rounds']} rounds and "
        f"{first.get('requests', 1)} requests"
    )
    _identity(table)
    for name in ("to first token", "speed-up", "per further token"):
        table.add_column(name, justify="right", no_wrap=True)
    full = next((batches_of(row.times)[size] for row in measured if row.is_full), None)
    for row, last in _with_breaks(measured):
        times = batches_of(row.times)[size]
        texts = [
            with_quartiles(times["prefill_ms"]),
            _speed_up(times, full),
            with_quartiles(times["decode_ms_per_token"]),
        ]
        table.add_row(row.title, row.keep_text, *texts, end_section=last)
    return table


def _speed_up(times: Mapping[str, Any], full: Mapping[str, Any] | None) -> str:
    if "speed_up" in times:
        return f"{with_quartiles(times['speed_up'])}x"
    return f"{full['prefill_ms']['median'] / times['prefill_ms']['median']:.2f}x" if full else "full not measured"


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
        table.add_row(method, keep_text(keep), *map(_against, found), end_section=last)
    return table


def _against(comparison: Comparison | None) -> str:
    if comparison is None:
        return "not compared"
    marks = {"better": "+", "worse": "-", "a tie": "="}
    return f"{100 * comparison.difference:+.1f} {marks[comparison.verdict]}"


def as_markdown(table: Table) -> str:
    """The table for a README: title, header, rows."""
    columns = list(table.columns)
    lines = [[str(column.header) for column in columns], ["---" if c.justify == "left" else "---:" for c in columns]]
    lines += [list(map(str, cells)) for cells in zip(*(column.cells for column in columns), strict=True)]
    body = "\n".join("| " + " | ".join(cell.strip() for cell in line) + " |" for line in lines)
    return f"**{table.title}**\n\n{body}\n"


def _identity(table: Table, width: int = 18) -> None:
    table.add_column("method", no_wrap=True, max_width=width)
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


def best_table(comparisons: Sequence[Comparison]) -> Table | None:
    """At each budget the highest mean, and the methods that these items do not tell from it."""
    if not comparisons:
        return None
    table = cost_style("Best at each budget, and what these items do not tell from it")
    table.add_column("keep", justify="right", no_wrap=True)
    table.add_column("best", no_wrap=True)
    table.add_column("ties with", overflow="fold")
    table.add_column("worse", justify="right", no_wrap=True)
    for keep in dict.fromkeys(comparison.keep for comparison in comparisons):
        pairs = [comparison for comparison in comparisons if comparison.keep == keep]
        names = list(dict.fromkeys(name for pair in pairs for name in (pair.method, pair.baseline)))
        best = max(names, key=lambda name: sum(_lead(pair, name) for pair in pairs))
        mine = [pair for pair in pairs if best in (pair.method, pair.baseline)]
        ties = [pair.baseline if pair.method == best else pair.method for pair in mine if pair.verdict == "a tie"]
        table.add_row(keep_text(keep), best, ", ".join(ties) or "none", str(len(mine) - len(ties)))
    return table


def _lead(pair: Comparison, name: str) -> float:
    return pair.difference * ((pair.method == name) - (pair.baseline == name))
