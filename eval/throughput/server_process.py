"""A server in a process of its own: started, waited for, watched and stopped with all its children."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from vlmprune.errors import VlmpruneError
from vlmprune.eval.run.cells import Cell

HOST = "127.0.0.1"
SHOWN_LINES = 40
STOP_SECONDS = 30.0


class ServerError(VlmpruneError, RuntimeError):
    """A server did not start, died, or answered a request with an error."""


class ServerProcess:
    """A server that was started here.

    Args:
        name: what it serves, for messages.
        command: the program and its arguments.
        port: where it is told to listen.
    """

    def __init__(self, name: str, command: Sequence[str], port: int) -> None:
        self.name = name
        self.address = f"http://{HOST}:{port}"
        self._log = tempfile.TemporaryFile()  # noqa: SIM115
        self._process = subprocess.Popen(
            command, stdout=self._log, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True
        )

    def check(self) -> None:
        """Raise `ServerError`, with the last lines that it printed, where the server has ended."""
        code = self._process.poll()
        if code is not None:
            raise ServerError(f"The server of {self.name} ended with exit code {code}. It printed last:\n{self.tail()}")

    def tail(self) -> str:
        """The last lines that the server printed."""
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").splitlines()
        return "\n".join(lines[-SHOWN_LINES:]) or "(nothing)"

    def wait(self, seconds: float) -> None:
        """Return when `GET /health` is answered with 200.

        Raises:
            ServerError: the server has ended, or `seconds` are over.
        """
        end = time.monotonic() + seconds
        while True:
            self.check()
            if get_text(f"{self.address}/health") is not None:
                return
            if time.monotonic() > end:
                raise ServerError(
                    f"The server of {self.name} was not ready after {seconds:g} s. It printed last:\n{self.tail()}"
                )
            time.sleep(0.2)

    def stop(self) -> None:
        """End the server and the processes that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            with suppress(ProcessLookupError):
                os.killpg(self._process.pid, number)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(STOP_SECONDS)
        self._log.close()


@contextmanager
def started(
    cell: Cell, model: str, engine: str, flags: Sequence[str] = (), wait_seconds: float = 600.0
) -> Iterator[ServerProcess]:
    """`vlmprune serve` of one cell on a free port of this machine, stopped at the end of the `with` statement.

    Args:
        cell: the method at its budget, or the unpruned model.
        model: what `vlmprune serve` takes as a model.
        engine: "transformers" or "vllm".
        flags: flags of the engine.
        wait_seconds: how long it may take until it is ready.

    Raises:
        ServerError: it ends before it is ready, or is not ready in time.
    """
    port = free_port()
    command = [sys.executable, "-m", "vlmprune", "serve", model, "--engine", engine, *_cell_flags(cell)]
    server = ServerProcess(cell.label, [*command, "--host", HOST, "--port", str(port), *flags], port)
    try:
        server.wait(wait_seconds)
        yield server
    finally:
        server.stop()


def _cell_flags(cell: Cell) -> list[str]:
    keep = [] if cell.keep is None else ["--keep", str(cell.keep)]
    return [] if cell.is_full else ["--method", cell.title, *keep]


def served_model(address: str) -> str:
    """The name of the model that a server serves, the first if there are several.

    Raises:
        ServerError: it does not say.
    """
    text = get_text(f"{address}/v1/models")
    try:
        return str(json.loads(text or "")["data"][0]["id"])
    except (ValueError, LookupError, TypeError):
        raise ServerError(
            f"{address}/v1/models names no model (is a server there?); if there is one, say with --model what requests call it."
        ) from None


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        number: int = probe.getsockname()[1]
        return number


def get_text(url: str, seconds: float = 5.0) -> str | None:
    """What a server answers to GET, None where it does not answer with 200."""
    try:
        with urllib.request.urlopen(url, timeout=seconds) as answer:
            text: str = answer.read().decode()
            return text
    except (urllib.error.URLError, OSError):
        return None
