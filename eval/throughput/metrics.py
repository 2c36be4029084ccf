"""Visual tokens before and after pruning, as a server that vlmprune started counts them."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .server_process import get_text

_LINE = re.compile(
    r"^vlmprune_(images|visual_tokens_before|visual_tokens_after)_total(?:\{[^}]*\})? (\S+)$", re.MULTILINE
)


@dataclass(frozen=True)
class VisualCounts:
    """Sums since the server started; tokens after pruning are means over the language model's layers."""

    images: float
    before: float
    after: float

    def since(self, earlier: VisualCounts) -> VisualCounts:
        """What was added after `earlier`."""
        return VisualCounts(self.images - earlier.images, self.before - earlier.before, self.after - earlier.after)


def read_counts(address: str) -> VisualCounts | None:
    """The counters of `GET /metrics`, summed over labels; None where the server has none of vlmprune."""
    found: dict[str, float] = {}
    for name, value in _LINE.findall(get_text(f"{address}/metrics") or ""):
        found[name] = found.get(name, 0.0) + float(value)
    if not found:
        return None
    return VisualCounts(found["images"], found["visual_tokens_before"], found["visual_tokens_after"])
