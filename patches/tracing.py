"""Calls that are traced into one graph: what a prefill keeps depends on values, which no such graph can follow."""

from __future__ import annotations

from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

from vlmprune.errors import UnsupportedCallError

_Arguments = ParamSpec("_Arguments")
_Result = TypeVar("_Result")


def never_compiled(function: Callable[_Arguments, _Result]) -> Callable[_Arguments, _Result]:
    """Decorate what `torch.compile` is to run as it is: a method's selection follows values, and no compiler knows its code."""
    disabled: Callable[_Arguments, _Result] = torch.compiler.disable(function)
    return disabled


def check_not_exported() -> None:
    """Raise UnsupportedCallError where torch.export, ONNX export or torch.jit.trace runs the model."""
    exporting = torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling()
    if exporting or torch._C._get_tracing_state() is not None:
        raise UnsupportedCallError(
            "A model with a pruning method of vlmprune cannot be exported or traced: which visual tokens stay depends on the "
            "image. Export it unpruned: call vlmprune.remove(model) first, and vlmprune.apply again afterwards."
        )


def break_graph() -> None:
    """Leave the graph that torch.compile is making; with `fullgraph=True`, and in a strict export, that is torch's error.

    torch gives its error the message from here.
    """
    if torch.compiler.is_dynamo_compiling():
        torch._dynamo.graph_break(
            msg="vlmprune prunes visual tokens here, and which ones stay depends on the image. Compile without fullgraph=True "
            "(generate compiles the decoding alone), or call vlmprune.remove(model) before compiling or exporting."
        )
