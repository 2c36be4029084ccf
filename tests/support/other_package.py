"""Packages of other people: their metadata as `pip install -e` leaves it on the path, and Python with them installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]


def install(root: Path, distribution: str, group: str, points: str) -> None:
    """Write the metadata of a package in the folder `root` that offers entry points, as pyproject.toml names them."""
    metadata = root / f"{re.sub('-', '_', distribution)}-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(f"[{group}]\n{points}\n".replace('"', ""))


def named_points(project: str, group: str) -> str:
    """Return the lines under `[project.entry-points."group"]` in the text of a pyproject.toml."""
    found = re.search(rf'entry-points\."{re.escape(group)}"\]\n((?:\w.*\n)+)', project)
    assert found is not None, project
    return found[1]


def run(root: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run Python in the checkout, with the package in `root` installed."""
    path = os.pathsep.join([str(root), str(ROOT), str(ROOT / "tests")])
    environment = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, *command], env=environment, cwd=ROOT, capture_output=True, text=True, check=False
    )
