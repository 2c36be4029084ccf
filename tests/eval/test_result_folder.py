from __future__ import annotations

import subprocess
import sys

import pytest

from vlmprune.eval.run.cells import Cell
from vlmprune.eval.run.result_folder import ResultFolder, ResultFolderError, differences, read_json, write_json

CONFIGURATION = {"model": {"source": "m", "dtype": "float32"}, "limit": 5}
CELL = Cell("pool", 0.5)


def test_cells_are_stored_and_found_again(tmp_path):
    folder = ResultFolder(tmp_path / "deep" / "out", CONFIGURATION)
    assert not folder.has(CELL)
    folder.write(CELL, {"score": 1})
    again = ResultFolder(tmp_path / "deep" / "out", CONFIGURATION)
    assert again.has(CELL)
    assert again.read(CELL)["score"] == 1
    assert not list(tmp_path.rglob("*.tmp"))


def test_another_configuration_is_refused_and_nothing_is_lost(tmp_path):
    ResultFolder(tmp_path, CONFIGURATION).write(CELL, {"score": 1})
    with pytest.raises(
        ResultFolderError, match=r"model.dtype: 'float32' there, 'bfloat16' now; limit: 5 there, None now"
    ):
        ResultFolder(tmp_path, {"model": {"source": "m", "dtype": "bfloat16"}, "limit": None})
    assert ResultFolder(tmp_path, CONFIGURATION).read(CELL)["score"] == 1


def test_folders_of_others_and_files_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("x")
    with pytest.raises(ResultFolderError, match="holds no vlmprune results"):
        ResultFolder(tmp_path, CONFIGURATION)
    with pytest.raises(ResultFolderError, match="is a file"):
        ResultFolder(tmp_path / "thesis.tex", CONFIGURATION)


@pytest.mark.parametrize("content", ["", "{", "[]", '{"label": "random keep=0.5"}'])
def test_damaged_cells_are_named(tmp_path, content):
    folder = ResultFolder(tmp_path, CONFIGURATION)
    folder.write(CELL, {})
    folder.cell_file(CELL).write_text(content)
    with pytest.raises(ResultFolderError, match=r"pool-keep=0\.5"):
        folder.read(CELL)
    with pytest.raises(ResultFolderError, match=r"pool-keep=0\.5"):
        folder.has(CELL)


def test_a_cell_without_its_fields_is_named(tmp_path):
    ResultFolder(tmp_path, CONFIGURATION).write(CELL, {"cost": {}})
    with pytest.raises(ResultFolderError, match=r"pool-keep=0\.5\.json' is damaged: it has no 'tasks'"):
        ResultFolder(tmp_path, CONFIGURATION, required={"cost": dict, "tasks": dict}).has(CELL)


def test_a_folder_knows_the_cells_of_earlier_runs(tmp_path):
    folder = ResultFolder(tmp_path, CONFIGURATION)
    cells = [
        CELL,
        Cell("random", 1, (("seed", 0),)),
        Cell("random", 1, (("seed", 1),), "repetition"),
        Cell("pyramiddrop", None, (("ratios", (0.5, 0.25)),)),
    ]
    for cell in cells:
        stored = {"method": cell.method, "title": cell.title, "keep": cell.keep, "repeats": cell.repeats}
        folder.write(cell, {**stored, "parameters": dict(cell.parameters)})
    assert set(folder.others([CELL])) == set(cells[1:])


def test_a_folder_is_held_by_one_run(tmp_path):
    folder = ResultFolder(tmp_path, CONFIGURATION)
    code = f"import filelock; a = filelock.FileLock({str(tmp_path / '.lock')!r}); a.acquire(); print(1, flush=True); input()"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        other.stdout.readline()
        with pytest.raises(ResultFolderError, match="Another run is writing"), folder.locked():
            pass
        other.communicate(b"\n")
    with folder.locked():
        assert ResultFolder(tmp_path, CONFIGURATION).path == tmp_path


def test_what_cannot_be_written_is_named(tmp_path):
    (tmp_path / "cells").touch()
    with pytest.raises(ResultFolderError, match=r"cells/pool-keep=0\.5\.json' cannot be written"):
        write_json(tmp_path / "cells" / "pool-keep=0.5.json", {})


def test_files_are_old_or_new_and_as_readable_as_any(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"a": 1})
    (tmp_path / "plain").touch()
    assert file.stat().st_mode == (tmp_path / "plain").stat().st_mode
    with pytest.raises(ValueError, match="Out of range"):
        write_json(file, {"a": float("nan")})
    assert read_json(file) == {"a": 1}
    assert [entry.name for entry in tmp_path.iterdir() if entry.suffix == ".tmp"] == []


def test_differences_reach_into_dictionaries():
    assert differences({"a": {"b": 1, "c": 2}}, {"a": {"b": 1, "d": 3}}) == [("a.c", 2, None), ("a.d", None, 3)]
