"""Every published test vector, run through the conformance runner."""

import json
from pathlib import Path

import conformance
import pytest
from safetensors.torch import load_file, save_file

GOLDEN = Path(__file__).parent.parent / "golden"
CASES = list(conformance.find_cases(GOLDEN))


@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_results_equal_the_official_ones(case):
    results, found = conformance.run_case(case)
    assert not found
    assert set(results) == set(case.entry["expected"])


def test_inputs_alone_are_enough(tmp_path):
    source = next(case for case in CASES if case.name == "fastervlm/n36_t7.safetensors")
    folder = tmp_path / "cases" / "fastervlm"
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text((source.path.parent / "cases.json").read_text())
    for case in CASES:
        if case.method == "fastervlm":
            stored = load_file(str(case.path))
            save_file({name: stored[name] for name in case.entry["inputs"]}, str(folder / case.path.name))
    assert conformance.main([str(tmp_path / "cases"), "--out", str(tmp_path / "out")]) == 0
    written = load_file(str(tmp_path / "out" / "fastervlm" / source.path.name))
    expected = load_file(str(source.path))
    assert (written["keep_idx"] == expected["keep_idx"]).all()


def test_a_difference_is_named_and_fails(tmp_path, capsys):
    source = next(case for case in CASES if case.name == "fastervlm/n36_t7.safetensors")
    folder = tmp_path / "fastervlm"
    folder.mkdir(parents=True)
    (folder / "cases.json").write_text(json.dumps([dict(source.entry)]))
    stored = load_file(str(source.path))
    stored["keep_idx"][0, 0] += 1
    save_file(stored, str(folder / source.path.name))
    assert conformance.main([str(tmp_path)]) == 1
    assert "keep_idx" in capsys.readouterr().out
