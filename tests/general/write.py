"""Run the contracts on every class and write docs/models.md: `python tests/general/write.py`."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[depth]) for depth in (1, 2)]

from support.general.compatibility import DOCUMENT, classes, render, served  # noqa: E402


def main() -> int:
    """Return 1 and leave the document as it is if a contract does not hold."""
    rows, wrong = [], 0
    for name in classes():
        try:
            rows.append(served(name))
            print(name, rows[-1].family or "no", flush=True)
        except Exception:
            wrong += 1
            print(f"--- {name}")
            traceback.print_exc(limit=-3)
    print(f"{sum(bool(row.family) for row in rows)} of {len(rows)} served, {wrong} wrong")
    if wrong:
        return 1
    DOCUMENT.write_text(render(rows), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
