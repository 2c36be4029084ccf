"""vLLM's OpenAI-compatible server with a pruned model."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence

from vlmprune.errors import ParameterError
from vlmprune.eval.models.names import resolve_model
from vlmprune.eval.run.cells import Cell
from vlmprune.patches.vllm.refusals import check_method
from vlmprune.patches.vllm.versions import check_version, installed_version

MODULE = "vllm.entrypoints.openai.api_server"
OVERRIDES = "--hf-overrides"


def serve_vllm(model: str, cell: Cell, rest: Sequence[str]) -> None:
    """Become vLLM's server on one model, pruned by the plug-in as a cell says. Does not return.

    Args:
        model: a shipped name, a folder or a hub name.
        cell: the method at its budget, or the unpruned model.
        rest: vLLM's own flags.

    Raises:
        UnknownNameError: `model` is no name.
        ModelLoadError: its folder is not complete.
        UnsupportedCallError: a version of vLLM that was not tested.
        UnsupportedMethodError: the method cannot be served by vLLM.
        ParameterError: `rest` overrides the configuration too.
    """
    sys.stdout.flush()
    os.execv(sys.executable, [sys.executable, *server_arguments(model, cell, rest)])


def server_arguments(model: str, cell: Cell, rest: Sequence[str]) -> list[str]:
    """What Python is called with; arguments and errors as of `serve_vllm`."""
    arguments = ["-m", MODULE, "--model", resolve_model(model), *rest]
    method = cell.make_method()
    if method is None:
        return arguments
    check_version(installed_version())
    check_method(method)
    if any(flag.split("=")[0].replace("_", "-") == OVERRIDES for flag in rest):
        raise ParameterError(
            f"{OVERRIDES} beside --method; allowed: one of them, with the key 'vlmprune' in {OVERRIDES}."
        )
    keep = {} if cell.keep is None else {"keep": cell.keep}
    setting = {"method": cell.method, **keep, **cell.arguments}
    return [*arguments, OVERRIDES, json.dumps({"vlmprune": setting})]
