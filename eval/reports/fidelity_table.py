"""The terminal's table of agreement with the unpruned model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rich.table import Table

from vlmprune.eval.run.figures import keep_text, percent
from vlmprune.eval.run.table_style import cost_style


def fidelity_table(rows: Sequence[Any]) -> Table:
    """Shares in percent, divergence in nats, each with its 95 % interval."""
    table = cost_style(f"Agreement with the unpruned model on {rows[0].items} prompts (95 % intervals)")
    table.add_column("method", no_wrap=True, max_width=20)
    for name in ("keep", "tokens", "same answer %", "first token %", "KL (nats)", "worst KL"):
        table.add_column(name, justify="right", no_wrap=True)
    for row, following in zip(rows, [*rows[1:], None], strict=True):
        low, high = (percent(value, 0) for value in row.same_answer_95)
        table.add_row(
            row.title,
            keep_text(row.keep),
            f"{row.visual_tokens:.0f}",
            f"{percent(row.same_answer)} ({low}-{high})",
            percent(row.same_first_token),
            f"{row.kl:.3g} ({row.kl_95[0]:.2g}-{row.kl_95[1]:.2g})",
            f"{row.kl_worst:.3g}",
            end_section=following is None or following.title != row.title,
        )
    return table
