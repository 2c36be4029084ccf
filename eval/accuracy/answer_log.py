"""Answers of a cell that is not finished, stored batch by batch, so that a kill loses one batch."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmprune.eval.flops import VisionWork

from .request_records import RequestRecord

Key = tuple[str, int, str, int]
"""Kind of request, its place among those of the run, task and item."""


class AnswerLog:
    """One line a batch in a file under `unfinished/`, which is deleted when its cell is finished.

    Args:
        file: where the answers are kept; those that it holds are found again.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self._answers: dict[Key, tuple[Any, RequestRecord | None]] = {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                try:
                    batch = json.loads(line)
                except ValueError:
                    # The line that was being written when the run was killed.
                    continue
                for key, answer, record in batch:
                    self._answers[tuple(key)] = (answer, _record(record))

    def find(self, key: Key) -> tuple[Any, RequestRecord | None] | None:
        """The stored answer and its record, if there is one."""
        return self._answers.get(key)

    def add(self, batch: Sequence[tuple[Key, Any, RequestRecord | None]]) -> None:
        """Store a batch at once."""
        lines = [(key, answer, None if record is None else asdict(record)) for key, answer, record in batch]
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as file:
            file.write(("\n" if self._torn() else "") + json.dumps(lines) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def _torn(self) -> bool:
        """Whether the file ends inside a line."""
        if not self.file.stat().st_size:
            return False
        with self.file.open("rb") as file:
            file.seek(-1, os.SEEK_END)
            return file.read(1) != b"\n"

    def close(self) -> None:
        """Delete the file: the cell is finished."""
        self.file.unlink(missing_ok=True)


def _record(content: dict[str, Any] | None) -> RequestRecord | None:
    if content is None:
        return None
    return RequestRecord(**{**_tuples(content), "work": VisionWork(**_tuples(content["work"]))})


def _tuples(content: dict[str, Any]) -> dict[str, Any]:
    return {key: _tuple(value) if isinstance(value, list) else value for key, value in content.items()}


def _tuple(value: list[Any]) -> tuple[Any, ...]:
    return tuple(_tuple(part) if isinstance(part, list) else part for part in value)
