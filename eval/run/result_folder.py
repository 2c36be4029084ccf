"""A folder of results that an interrupted run can go on with and that never mixes two configurations."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from vlmprune.errors import VlmpruneError

from .cells import Cell


class ResultFolderError(VlmpruneError, RuntimeError):
    """The folder cannot take these results, or holds a file that cannot be read."""


def write_json(path: Path, content: Any) -> None:
    """Write `content` so that the file is either the old or the new one, whatever happens.

    Raises:
        ResultFolderError: it cannot be written; names the file.
    """
    unfinished = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with unfinished.open("w", encoding="utf-8") as file:
            json.dump(content, file, indent=1, allow_nan=False, default=str)
            file.write("\n")
        os.replace(unfinished, path)
    except OSError as error:
        raise ResultFolderError(f"{str(path)!r} cannot be written: {error.strerror or error}.") from error
    finally:
        with suppress(OSError):
            unfinished.unlink()


def read_json(path: Path) -> Any:
    """Read a result file.

    Raises:
        ResultFolderError: it is damaged; names the file.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ResultFolderError(
            f"Result file {str(path)!r} cannot be read ({error}). Delete it to have it made again."
        ) from error


class ResultFolder:
    """`configuration.json`, one file a finished cell under `cells/`, and `timing.json`.

    Args:
        path: the folder.
        configuration: what decides results besides method and budget.
        write: whether to begin a new folder.
        required: what every stored cell must hold, with its type.

    Raises:
        ResultFolderError: `path` holds results of another configuration, or other files.
    """

    def __init__(
        self,
        path: str | Path,
        configuration: Mapping[str, Any],
        write: bool = True,
        required: Mapping[str, type] | None = None,
    ) -> None:
        self.path = Path(path)
        self.required = dict(required or {})
        self.configuration = json.loads(json.dumps(configuration, default=str))
        file = self.path / "configuration.json"
        if self.path.exists() and not self.path.is_dir():
            raise ResultFolderError(f"--out {str(path)!r} is a file; name a folder.")
        if file.exists():
            self._compare(read_json(file))
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise ResultFolderError(
                f"--out {str(path)!r} is not empty and holds no vlmprune results; name another folder."
            )
        elif write:
            write_json(file, self.configuration)

    def _compare(self, stored: Any) -> None:
        changed = list(differences(stored, self.configuration))
        if changed:
            shown = "; ".join(f"{key}: {old!r} there, {new!r} now" for key, old, new in changed[:4])
            more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
            raise ResultFolderError(
                f"{str(self.path)!r} holds results of another configuration ({shown}{more}). "
                "Name another --out, or delete the folder."
            )

    def cell_file(self, cell: Cell) -> Path:
        """Where the cell's result is or will be."""
        return self.path / "cells" / f"{cell.slug}.json"

    def unfinished(self, cell: Cell, rank: int) -> Path:
        """Where a process keeps its answers in a cell until that is finished."""
        return self.path / "unfinished" / f"{cell.slug}.{rank}.jsonl"

    def has(self, cell: Cell) -> bool:
        """Whether the cell is finished.

        Raises:
            ResultFolderError: its file is damaged, which is found before anything else is run.
        """
        return self.cell_file(cell).exists() and bool(self.read(cell))

    def read(self, cell: Cell) -> dict[str, Any]:
        """The cell's result."""
        result = self._checked(self.cell_file(cell))
        if result.get("label") != cell.label:
            raise ResultFolderError(
                f"Result file {str(self.cell_file(cell))!r} is not of cell {cell.label!r}. Delete it."
            )
        return result

    def others(self, cells: Iterable[Cell]) -> list[Cell]:
        """The finished cells that are not among `cells`: those of earlier runs in this folder."""
        known = {self.cell_file(cell) for cell in cells}
        files = sorted(file for file in (self.path / "cells").glob("*.json") if file not in known)
        return [Cell.from_stored(self._checked(file)) for file in files]

    def _checked(self, file: Path) -> dict[str, Any]:
        result = read_json(file)
        if not isinstance(result, dict):
            raise ResultFolderError(f"Result file {str(file)!r} holds no cell. Delete it.")
        for name, kind in self.required.items():
            if not isinstance(result.get(name), kind):
                what = f"no {name!r}" if name not in result else f"{name!r} of type {type(result[name]).__name__}"
                raise ResultFolderError(f"Result file {str(file)!r} is damaged: it has {what}. Delete it.")
        return result

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the folder: another run that wants it while the context lasts is refused.

        Raises:
            ResultFolderError: another run holds it.
        """
        lock = FileLock(str(self.path / ".lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise ResultFolderError(
                f"Another run is writing to {str(self.path)!r}. Wait until it has ended, or name another --out."
            ) from None
        except OSError as error:
            raise ResultFolderError(f"--out {str(self.path)!r} cannot be written: {error}") from error
        try:
            yield
        finally:
            lock.release()

    def write(self, cell: Cell, result: Mapping[str, Any]) -> None:
        """Store the finished cell."""
        write_json(self.cell_file(cell), {"label": cell.label, **result})


def differences(old: Any, new: Any, prefix: str = "") -> list[tuple[str, Any, Any]]:
    """(path, old, new) of every leaf in which two JSON values differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [
            d
            for key in keys
            for d in differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else str(key))
        ]
    return [] if old == new else [(prefix, old, new)]
