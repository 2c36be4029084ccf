"""What some classes need beside their own defaults shrunk, by the name of the class."""

from __future__ import annotations

from typing import Any

CHANGES: dict[str, dict[str, Any]] = {}
