"""Every kernel compiles for GPUs that this machine does not have, and keeps its data in registers."""

import csv
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from vlmprune.kernels.bench import compilation
from vlmprune.kernels.shared.implementation import TRITON_FOUND, KernelUnavailableError

ROOT = Path(__file__).resolve().parents[2]

# A few values for a whole program are no harm.
MOST_SPILLED_BYTES = 64


@pytest.mark.skipif(not TRITON_FOUND, reason="triton is not installed")
@pytest.mark.parametrize("capability", compilation.CAPABILITIES)
def test_every_kernel_compiles(capability: int, tmp_path: Path) -> None:
    # Without the interpreter, which this process may have chosen. Triton keeps what it compiled, so a second run is short.
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TRITON_INTERPRET": "0"}
    out = tmp_path / "kernels.csv"
    command = [sys.executable, "-m", "vlmprune.kernels.bench", "--compile", "--capabilities", str(capability)]
    result = subprocess.run([*command, "--out", out], cwd=tmp_path, env=environment, capture_output=True, text=True)
    print(result.stdout)
    assert result.returncode == 0, result.stdout + result.stderr
    with out.open() as file:
        rows = list(csv.DictReader(file))
    assert {int(row["capability"]) for row in rows} == {capability}
    spilled = [(row["op"], row["kernel"], row["case"], row["spill_bytes"]) for row in rows]
    assert not [row for row in spilled if int(row[-1]) > MOST_SPILLED_BYTES]
    assert all(int(row["registers"]) > 0 for row in rows)
    # A kernel that no case launches would go uncompiled.
    folder = ROOT / "kernels"
    sources = [*folder.glob("*.py"), *(folder / "shared").glob("*.py")]
    written = {name for source in sources for name in re.findall(r"^def (\w+_kernel)\(", source.read_text(), re.M)}
    assert {row["kernel"] for row in rows} == written


def test_interpreted_kernels_cannot_be_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compilation, "triton_is_interpreted", lambda: True)
    with pytest.raises(KernelUnavailableError, match="TRITON_INTERPRET"):
        compilation.compile_all(["compact"], [90])
