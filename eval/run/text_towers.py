"""What methods that score patches against the question are given by the commands: a text tower, and the model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

from vlmprune.methods.registry import get_method

from .cells import Cell

FOLDER = "text_tower"


def text_tower_of(source: str, named: str | None = None) -> str | None:
    """The text tower that was named or else, where there is one, the folder `text_tower` in the model's own."""
    own = Path(source) / FOLDER
    return named or (str(own) if own.is_dir() else None)


def takes_text_tower(method: str) -> bool:
    """Whether a method has a parameter for one."""
    return any(field.name == "text_tower" for field in fields(get_method(method)))


def equipped(cells: Iterable[Cell], text_tower: Any, processor: Any) -> list[Cell]:
    """The cells, those of methods that take a text tower with it and with the tokenizer; named parameters go before.

    Args:
        cells: rows of a table.
        text_tower: folder, hub name or pair, or None.
        processor: the model's processor or tokenizer.
    """
    given = {"tokenizer": processor, **({} if text_tower is None else {"text_tower": text_tower})}
    resources = tuple(given.items())
    return [
        replace(cell, resources=resources) if cell.is_pruned and takes_text_tower(cell.method) else cell
        for cell in cells
    ]
