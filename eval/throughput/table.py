"""The table of a measurement: terminal, Markdown, CSV."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.table import Table

from vlmprune.budget import Keep
from vlmprune.eval.run.cells import FULL
from vlmprune.eval.run.csv_lines import flattened
from vlmprune.eval.run.figures import keep_text, three_figures
from vlmprune.eval.run.table_style import cost_style

from .load import Level

COLUMNS = (
    "clients", "requests/s", "against the first", "TTFT ms", "p95", "between tokens ms", "p95", "visual tokens",
)  # fmt: skip
UNKNOWN = "unknown"


@dataclass(frozen=True)
class Row:
    """One setting under one load.

    Attributes:
        setting: name of the setting.
        keep: its budget, None where it has none or none is known.
        level: what was measured.
        faster: requests per second against the first setting under the same load; None of the first itself.
        visual_before: mean visual tokens of an image as the server counts them, None where it does not.
        visual_after: those that are left.
    """

    setting: str
    keep: Keep | None
    level: Level
    faster: float | None = None
    visual_before: float | None = None
    visual_after: float | None = None

    def cells(self) -> list[str]:
        """The texts of the columns."""
        level = self.level
        times = [level.ttft, level.inter_token]
        shown = [
            "none" if spread is None else three_figures(1000 * spread[part])
            for spread in times
            for part in ("median", "p95")
        ]
        faster = "" if self.faster is None else f"{self.faster:.2f}x"
        tokens = "all" if self.setting == FULL else UNKNOWN
        if self.visual_before is not None and self.visual_after is not None:
            tokens = f"{self.visual_before:.0f} to {self.visual_after:.0f}"
        return [str(level.concurrency), three_figures(level.requests_per_second), faster, *shown, tokens]


def terminal_table(rows: Sequence[Row], title: str) -> Table:
    """The table for a terminal of 100 columns."""
    table = cost_style(title)
    table.add_column("setting", no_wrap=True, max_width=20)
    for name in ("keep", *COLUMNS):
        table.add_column(name, justify="right")
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        last = following is None or (following.setting, following.keep) != (row.setting, row.keep)
        table.add_row(row.setting, keep_text(row.keep), *row.cells(), end_section=last)
    return table


def markdown(rows: Sequence[Row], title: str, machine: Mapping[str, Any]) -> str:
    """The same as Markdown, with the machine under it."""
    lines = [f"{title}:", "", f"| setting | keep | {' | '.join(COLUMNS)} |", "|---|" + "---|" * (1 + len(COLUMNS))]
    lines += [f"| `{row.setting}` | {' | '.join([keep_text(row.keep), *row.cells()])} |" for row in rows]
    known = {name: version for name, version in machine["packages"].items() if version is not None}
    versions = ", ".join(f"{name} {version}" for name, version in known.items())
    lines += [
        "",
        f"{machine['cpus']} CPUs ({machine['cpu']}), GPU {machine['gpu'] or 'none'}; {versions}; {machine['date']}.",
    ]
    return "\n".join(lines) + "\n"


def csv_line(row: Row) -> dict[str, Any]:
    """One line of the CSV file, times in seconds."""
    values = asdict(row)
    level = values.pop("level")
    return flattened({**values, **level}, digits=6, unit="_seconds")
