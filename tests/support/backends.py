"""The attention backends that transformers offers, set on a whole model for a while."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch.nn.attention import flex_attention as library
from transformers.integrations.flex_attention import WrappedFlexAttention

from support.flash_on_cpu import flash_on_cpu


@contextmanager
def implementation(model: Any, name: str) -> Iterator[None]:
    """Run tower and language model with an implementation that the host knows by name."""
    parts = [part for part in model.modules() if hasattr(part, "config")]
    previous = [part.config._attn_implementation for part in parts]
    model.set_attn_implementation(name)
    try:
        yield
    finally:
        for part, before in zip(parts, previous, strict=True):
            part.config._attn_implementation = before


@contextmanager
def flex(model: Any) -> Iterator[None]:
    """Run FlexAttention uncompiled: the same masks and results, without minutes of compiling on a CPU."""
    wrapped = WrappedFlexAttention(training=False)
    compiled, wrapped._compiled_flex_attention = wrapped._compiled_flex_attention, library.flex_attention
    library._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = True
    try:
        with implementation(model, "flex_attention"):
            yield
    finally:
        wrapped._compiled_flex_attention = compiled
        library._FLEX_ATTENTION_DISABLE_COMPILE_DEBUG = False


BACKENDS: dict[str, Callable[[Any], AbstractContextManager[None]]] = {
    "eager": lambda model: implementation(model, "eager"),
    "flex_attention": flex,
    "flash_attention_2": flash_on_cpu,
}
