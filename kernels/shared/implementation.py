"""Which code runs an op: the torch reference or the Triton kernel."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    triton: Any
    tl: Any
    TRITON_FOUND: bool
else:
    try:
        import triton
        import triton.language as tl

        TRITON_FOUND = True
    except ImportError:

        class _MissingTriton:
            """Lets the kernel files be imported where triton is not installed; nothing in it can be launched."""

            @staticmethod
            def jit(function):
                return function

        triton, tl, TRITON_FOUND = _MissingTriton(), None, False

IMPLEMENTATIONS = ("torch", "triton")


class KernelUnavailableError(RuntimeError):
    """The implementation that the caller asked for cannot run on this machine or on these tensors."""


def triton_is_interpreted() -> bool:
    """Whether triton runs kernels on the CPU, that is, was imported under `TRITON_INTERPRET=1`."""
    # The variable counts only at the moment triton is imported, so ask what that import made and not the environment.
    return TRITON_FOUND and type(tl.sum).__name__ == "InterpretedFunction"


def dot_needs_fp32(*operands: torch.Tensor) -> bool:
    """Whether a kernel must widen these operands to fp32 before `tl.dot`: unlike dtypes, or bf16 in the interpreter."""
    # The interpreter (triton 3.6 to 3.9) multiplies the raw bits of bf16 numbers.
    dtypes = {operand.dtype for operand in operands}
    return len(dtypes) > 1 or (torch.bfloat16 in dtypes and triton_is_interpreted())


def choose_implementation(tensor_device: torch.device | str, implementation: str | None = None) -> str:
    """Return "torch" or "triton" for tensors on `tensor_device`.

    Args:
        tensor_device: where the tensors of the call are.
        implementation: None for the device's own (cuda: triton where it is installed; others: torch), or a forced name.

    Raises:
        ValueError: `implementation` is not one of `IMPLEMENTATIONS`.
        KernelUnavailableError: "triton" is forced where it cannot run.
    """
    device = tensor_device if isinstance(tensor_device, torch.device) else torch.device(tensor_device)
    if implementation is None:
        return "triton" if device.type == "cuda" and TRITON_FOUND else "torch"
    if implementation not in IMPLEMENTATIONS:
        nearest = get_close_matches(str(implementation), IMPLEMENTATIONS, n=1)
        hint = f" Did you mean {nearest[0]!r}?" if nearest else ""
        raise ValueError(f"implementation={implementation!r} is not one of {', '.join(IMPLEMENTATIONS)} or None.{hint}")
    if implementation == "triton":
        if not TRITON_FOUND:
            raise KernelUnavailableError("implementation='triton' was forced, but triton is not installed.")
        if device.type != "cuda" and not triton_is_interpreted():
            raise KernelUnavailableError(
                f"implementation='triton' was forced for tensors on {device.type!r}: allowed are 'cuda' tensors, "
                "or any tensors when TRITON_INTERPRET=1 is set before triton is first imported."
            )
    return implementation
