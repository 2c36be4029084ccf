"""The style that all tables of the terminal share."""

from __future__ import annotations

from rich import box
from rich.table import Table


def cost_style(title: str) -> Table:
    """An empty table in the style of all."""
    return Table(
        title=title,
        title_justify="left",
        title_style="bold",
        box=box.SIMPLE_HEAD,
        padding=(0, 1),
        collapse_padding=True,
        pad_edge=False,
        show_edge=False,
    )
