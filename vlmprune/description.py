"""What `describe` prints of a patched model, for bug reports."""

from __future__ import annotations

import platform
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn

    from vlmprune.patches.engine import PruningEngine


def describe_engine(model: nn.Module, engine: PruningEngine) -> str:
    """Return versions, model, method and hooks in the order in which they were added, one a line."""
    import torch
    import transformers

    from . import __version__

    text = model.config.get_text_config()  # type: ignore[union-attr, operator]
    lines = [
        f"vlmprune {__version__}, transformers {transformers.__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}",
        f"{type(model).__name__} as {engine.family.name}, {text.num_hidden_layers} layers, "
        f"attention {text._attn_implementation}, {next(model.parameters()).dtype}",
        f"{engine.pipeline!r}, positions {engine.sites.positions}, scores by {engine.sites.signal or 'no attention'}",
    ]
    hooks = engine.hooks.described(model)
    width = max(len(path) for path, _, _ in hooks)
    lines += [f"  {path:<{width}}  {kind:<7} {name}" for path, kind, name in hooks]
    return "\n".join(lines)
