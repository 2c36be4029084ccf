"""Where the parts of a tiny model are."""

from __future__ import annotations

from typing import Any


def decoder(model: Any) -> Any:
    """Return the language model, without its head."""
    inner = model.model
    return inner.text_model if hasattr(inner, "text_model") else inner.language_model
