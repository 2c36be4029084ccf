"""The servers that are compared: those that are started here, and those that run already."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from vlmprune.budget import Keep
from vlmprune.errors import ParameterError
from vlmprune.eval.models.names import resolve_model
from vlmprune.eval.run.cells import Cell

from .random_checkpoint import write_random_checkpoint
from .server_process import ServerProcess, started


@dataclass(frozen=True)
class Server:
    """One setting.

    Attributes:
        setting: its name.
        keep: its budget, None where it has none or none is known.
        model: what requests call the model, None where the server is to be asked.
        address: of a server that runs, without `/v1`.
        start: starts the server for the body of a `with` statement, None where it runs.
        must_drop: whether a server with as many visual tokens as before would not do what was asked.
    """

    setting: str
    keep: Keep | None = None
    model: str | None = None
    address: str = ""
    start: Callable[[], AbstractContextManager[ServerProcess]] | None = None
    must_drop: bool = False

    @property
    def label(self) -> str:
        """Name and budget."""
        return self.setting if self.keep is None else f"{self.setting} keep={self.keep}"


def running_servers(urls: Sequence[str], model: str | None) -> list[Server]:
    """Servers that run already, from `name=http://host:port`, with or without `/v1`.

    Raises:
        ParameterError: it is something else.
    """
    servers = []
    for text in urls:
        name, _, address = text.partition("=")
        if not name or not address.startswith(("http://", "https://")):
            raise ParameterError(f"--url {text!r}; allowed: a name and an address, full=http://localhost:8000.")
        servers.append(Server(name, model=model, address=address.rstrip("/").removesuffix("/v1")))
    return servers


@contextmanager
def open_servers(
    model: str | None,
    preset: str | None,
    cells: Sequence[Cell],
    engine: str,
    flags: Sequence[str] = (),
    wait_seconds: float = 600.0,
) -> Iterator[list[Server]]:
    """Servers that will be started, one for each cell; a preset's random weights lie on disk as long as the context lasts.

    Args:
        model: a shipped name, a folder or a hub name.
        preset: in its place a true architecture with random weights.
        cells: methods at budgets.
        engine: "transformers" or "vllm".
        flags: the engine's own flags.
        wait_seconds: how long a server may take until it is ready.

    Raises:
        UnknownNameError: there is no such model or preset.
        ModelLoadError: the model's folder is not complete.
    """
    with tempfile.TemporaryDirectory(prefix="vlmprune-") as folder:
        source = str(write_random_checkpoint(preset, Path(folder) / preset)) if preset else resolve_model(str(model))
        yield [_server(cell, source, engine, flags, wait_seconds) for cell in cells]


def _server(cell: Cell, source: str, engine: str, flags: Sequence[str], wait_seconds: float) -> Server:
    method = cell.make_method()
    drops = (
        method is not None and method.keep != 1.0 and any(part.site in ("input", "layer") for part in method.parts())
    )
    return Server(
        setting=cell.title,
        keep=cell.keep,
        # transformers' server knows a model by its folder and lists those of the hub's cache.
        model=source if engine == "transformers" else None,
        start=partial(started, cell, source, engine, flags, wait_seconds),
        must_drop=drops,
    )
