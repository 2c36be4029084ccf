"""`transformers serve` with a pruned model."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from contextlib import suppress
from typing import Any

import typer
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.requests import Request
from starlette.responses import Response
from transformers import __version__ as transformers_version
from transformers.cli.serve import Serve

import vlmprune
from vlmprune.errors import AlreadyAppliedError, NoRunError, UnsupportedCallError
from vlmprune.eval.models.names import ModelLoadError, resolve_model
from vlmprune.eval.run.cells import Cell
from vlmprune.record import RunRecord

from .counters import PruningCounters

logger = logging.getLogger("uvicorn.error.vlmprune")
"""Below the logger that the server sets up and prints."""


def serve_transformers(model: str, cell: Cell, rest: Sequence[str]) -> None:
    """Run `transformers serve` on one model, pruned as a cell says, until it is stopped.

    The server's own class is run, with its own flags. Before it takes a request, the method is applied to what its model manager
    has loaded; models that it loads later are pruned too. `GET /metrics` counts visual tokens before and after.

    Args:
        model: a shipped name, a folder or a hub name. Requests name it as the folder or hub name, or not at all.
        cell: the method at its budget, or the unpruned model.
        rest: flags of `transformers serve`.

    Raises:
        UnknownNameError: `model` is no name.
        ModelLoadError: it cannot be loaded.
        UnsupportedFamilyError: it is no vision-language model that can be pruned.
        UnsupportedMethodError: the method cannot serve it.
        BudgetError: nor can the budget.
        SystemExit: a flag is wrong.
    """
    source = resolve_model(model)
    app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
    app.command(name="serve")(pruned_server(cell))
    try:
        app([source, *rest, "--non-blocking"], prog_name="vlmprune serve --engine transformers")
    except OSError as error:
        if error.filename is not None:
            raise
        raise ModelLoadError(f"Cannot load {source!r}: {str(error).strip().splitlines()[0]}") from error


def pruned_server(cell: Cell) -> type[Serve]:
    """The server's class, whose models are pruned as `cell` says."""

    class PrunedServe(Serve):
        def start_server(self) -> None:
            """Prune what is loaded and run in this thread, where the server takes signals."""
            manager = getattr(self, "_model_manager", None)
            if manager is None:
                raise UnsupportedCallError(
                    f"transformers {transformers_version} keeps the models that it serves where vlmprune does not know them; "
                    "transformers 5.17 to 5.23 are known."
                )
            if cell.is_pruned:
                counters = PruningCounters(cell)
                prune_what_is_loaded(manager, cell, counters)
                self.server.config.app.add_route("/metrics", _metrics_route(counters))
            self.server.run()

    PrunedServe.__doc__ = Serve.__doc__
    return PrunedServe


def prune_what_is_loaded(manager: Any, cell: Cell, counters: PruningCounters) -> None:
    """Apply the method to the models that a model manager holds, and to every one that it hands out later.

    Clients can have a model unloaded (`POST /reset`); it is loaded again by the next request.

    Raises:
        VlmpruneError: a model cannot be pruned; names the reason.
    """
    load, lock = manager.load_model_and_processor, threading.Lock()

    def load_pruned(*args: Any, **kwargs: Any) -> Any:
        # Nobody is handed a model between its loading and its pruning.
        with lock:
            model, processor = load(*args, **kwargs)
            _prune(model, cell, counters)
            return model, processor

    for loaded in manager.loaded_models.values():
        _prune(loaded.model, cell, counters)
    manager.load_model_and_processor = load_pruned


def _prune(model: Any, cell: Cell, counters: PruningCounters) -> None:
    try:
        vlmprune.apply(model, cell.method, cell.keep, **cell.arguments)
    except AlreadyAppliedError:
        return
    counted: list[RunRecord] = []

    def count(*call: Any) -> None:
        with suppress(NoRunError):
            record = vlmprune.last_run(model)
            if record not in counted:
                counted[:] = [record]
                if record.image_totals:
                    before, after = counters.add(record)
                    logger.info("%s: %d visual tokens -> %g", cell.label, before, after)

    model.register_forward_hook(count)
    logger.info("%s prunes every prefill of %s; GET /metrics counts", cell.label, type(model).__name__)


def _metrics_route(counters: PruningCounters) -> Any:
    def metrics(request: Request) -> Response:
        return Response(counters.exposition(), media_type=CONTENT_TYPE_LATEST)

    return metrics
