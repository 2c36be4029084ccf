"""Run the decoding matrix and write docs/compatibility.md: `python tests/decoding/write.py`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (1, 2)]

from decoding.matrix import DOCUMENT, cells, outcome, render  # noqa: E402


def main() -> int:
    """Return 1 and leave the document as it is if a cell is neither right nor refused."""
    results, wrong = {}, 0
    for cell in cells():
        try:
            results[cell] = outcome(cell)
        except Exception:
            wrong += 1
            print(f"--- {cell.id}")
            traceback.print_exc(limit=-3)
    print(f"{len(results)} cells, {wrong} wrong")
    if wrong:
        return 1
    DOCUMENT.write_text(render(results), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
