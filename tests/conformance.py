"""Feed the inputs of published test cases to vlmprune, write what it gives, and compare where the answer is known.

    python tests/conformance.py CASES_DIR [--out OUT_DIR] [--methods a,b]

CASES_DIR holds `<method>/cases.json` and the safetensors files it names. The methods see only the tensors listed
under `inputs`; results go to `<OUT_DIR>/<method>/<file>` under the names listed under `expected`. The exit status is
1 if a case differs from its expected tensors or cannot be run.
"""

from __future__ import annotations

import argparse
import json
import sys
import traceback
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from pkgutil import iter_modules
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

import official_cases
from official_cases.comparison import differences

# Every module of `official_cases` that runs cases names them by method in its `RUNS`.
RUNS = {
    method: run
    for module in sorted(info.name for info in iter_modules(official_cases.__path__))
    for method, run in getattr(import_module(f"official_cases.{module}"), "RUNS", {}).items()
}


@dataclass(frozen=True)
class Case:
    """One entry of a `cases.json`."""

    method: str
    path: Path
    entry: Mapping[str, Any]

    @property
    def name(self) -> str:
        """Method and file."""
        return f"{self.method}/{self.path.name}"


def find_cases(root: Path, methods: list[str] | None = None) -> Iterator[Case]:
    """Yield the cases under `root`, of all methods or of the named ones."""
    for listing in sorted(root.glob("*/cases.json")):
        if methods is None or listing.parent.name in methods:
            for entry in json.loads(listing.read_text()):
                yield Case(listing.parent.name, listing.parent / entry["file"], entry)


def run_case(case: Case) -> tuple[dict[str, Tensor], list[str]]:
    """Return the results of a case, and how they differ from the expected tensors that its file carries."""
    names = case.entry.get("expected", {})
    with safe_open(str(case.path), "pt") as file:
        stored = set(file.keys())
        inputs = {name: file.get_tensor(name) for name in case.entry["inputs"]}
        expected = {name: file.get_tensor(name) for name in names if name in stored}
    if isinstance(names, list):
        names = dict.fromkeys(names)
    got = RUNS[case.method](case.entry.get("params") or {}, inputs)
    if names:
        got = {name: _as_listed(values, names[name]) for name, values in got.items() if name in names}
    found = differences(case.entry, inputs, got, expected) if expected else []
    return got, found


def _as_listed(values: Tensor, listed: object) -> Tensor:
    dtype = listed.get("dtype") if isinstance(listed, Mapping) else None
    return values if dtype is None else values.to(getattr(torch, str(dtype)))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", type=Path, metavar="CASES_DIR")
    parser.add_argument("--out", type=Path, metavar="OUT_DIR", help="folder for the results")
    parser.add_argument("--methods", help="names separated by commas; all that can be run if not given")
    options = parser.parse_args(arguments)
    methods = options.methods.split(",") if options.methods else list(RUNS)
    unknown = [name for name in methods if name not in RUNS]
    if unknown:
        parser.error(f"unknown method {', '.join(unknown)}; allowed: {', '.join(RUNS)}")
    cases = list(find_cases(options.cases, methods))
    if not cases:
        parser.error(f"no <method>/cases.json of {', '.join(methods)} under {options.cases}")
    failed = 0
    for case in cases:
        try:
            results, found = run_case(case)
        except Exception as error:
            traceback.print_exc()
            results, found = {}, [f"{type(error).__name__}: {error}"]
        if options.out is not None and results:
            (options.out / case.method).mkdir(parents=True, exist_ok=True)
            plain = {name: values.detach().contiguous().clone() for name, values in results.items()}
            save_file(plain, str(options.out / case.method / case.path.name))
        failed += bool(found)
        print(f"{'FAIL' if found else 'ok':4}  {case.name}")
        for line in found:
            print(f"      {case.name}: {line}")
    print(f"{len(cases) - failed} of {len(cases)} cases pass")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
