"""A method from outside: one file that registers itself, under the contracts, in tables and in the command line's language."""

import os
import subprocess
import sys
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path

import pytest
import torch

import vlmprune
from support.tiny_configs import tiny_config
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import ParameterError, UnknownNameError
from vlmprune.methods import registry

TESTS = Path(__file__).parent.parent

SCAFFOLD = '''
"""Corner: the first tokens of the raster."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from vlmprune.methods import InputMethod, register
from vlmprune.methods.batch import Selection, VisualBatch


@register
@dataclass(frozen=True, kw_only=True)
class Corner(InputMethod):
    """Keep the first tokens, from `start` on as far as there are any.

    Attributes:
        start: first token that is kept.
    """

    start: int = 0

    name: ClassVar[str] = "corner"

    def select(self, batch: VisualBatch) -> Selection:
        """Take `budgets[i]` tokens of each image."""
        starts = [min(self.start, total - budget) for total, budget in zip(batch.counts, batch.budgets, strict=True)]
        kept = [torch.arange(first, first + budget) for first, budget in zip(starts, batch.budgets, strict=True)]
        return Selection(torch.cat(kept).to(batch.features.device), batch.budgets)
'''

CONTRACTS = ("identity", "oracle", "undo", "batch_equals_singles", "cache", "generate", "shapes")


@pytest.fixture
def corner(tmp_path, monkeypatch):
    """The class of the scaffold, registered for one test."""
    (tmp_path / "corner.py").write_text(SCAFFOLD)
    spec = spec_from_file_location("corner", tmp_path / "corner.py")
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "corner", module)
    spec.loader.exec_module(module)
    yield module.Corner
    del registry.METHODS["corner"]


def test_one_file_is_enough_for_the_contracts(tmp_path):
    """pytest collects the contract matrix with the scaffold as a plugin, and nothing else changed."""
    (tmp_path / "corner.py").write_text(SCAFFOLD)
    paths = [str(tmp_path), str(TESTS.parent), *filter(None, [os.environ.get("PYTHONPATH")])]
    modules = [str(TESTS / "contracts" / f"test_{name}.py") for name in CONTRACTS]
    options = ["-p", "corner", "-p", "no:cacheprovider", "-vv", "-k", f"corner-{LLAVA_CLIP_GQA} and not bf16"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", *modules, *options],
        cwd=TESTS.parent,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-3000:] + run.stderr[-1000:]
    for name in CONTRACTS:
        assert f"test_{name}.py::" in run.stdout, name


def test_it_is_known_by_its_name(corner):
    model, inputs = LLAVA_CLIP_GQA.build(torch.float32), LLAVA_CLIP_GQA.inputs([[3, "A", 4]])
    assert "corner" in vlmprune.list_methods(model)
    with torch.no_grad(), vlmprune.pruned(model, "corner", keep=5, start=2):
        model(**inputs)
        assert vlmprune.last_run(model).images[0].kept.tolist() == [2, 3, 4, 5, 6]
    with pytest.raises(UnknownNameError, match="Did you mean 'start'"):
        vlmprune.apply(model, "corner", strat=3)


def test_its_cost_is_not_counted_as_nothing(corner):
    pytest.importorskip("lmms_eval")
    from vlmprune.eval.accuracy.request_records import RequestRecord
    from vlmprune.eval.flops import VisionWork
    from vlmprune.eval.reports.summary import make_rows, results_csv, summarise_requests
    from vlmprune.eval.reports.tables import as_markdown, cost_table
    from vlmprune.eval.run.cells import make_cells, parse_methods

    config = tiny_config("llava")
    work, layers = VisionWork(crops=1), config.get_text_config().num_hidden_layers
    cells = make_cells(parse_methods("uniform,corner:start=3"), [4], seed=0)
    results = []
    for cell in cells:
        kept = 36 if cell.is_full else 4
        record = RequestRecord(
            "t", 0, 36, (kept,) * layers, text_tokens=7, new_tokens=2, work=work, images=((36, kept),)
        )
        cost = summarise_requests(config, [record], 4, cell.make_method())
        task = {"score": 0.5, "higher_is_better": True, "samples": []}
        names = {"method": cell.method, "title": cell.title, "keep": cell.keep, "label": cell.label}
        results.append({**names, "tasks": {"t": task}, "cost": cost})
    rows = make_rows(results, {})
    uniform, outside = rows[1], rows[2]
    assert uniform.flops["selection"] == 0
    assert outside.flops["selection"] is None
    assert outside.prefill_flops == uniform.prefill_flops
    header, _, known, unknown = results_csv(rows).splitlines()
    column = header.split(",").index("gflops_selection")
    assert (known.split(",")[column], unknown.split(",")[column]) == ("0", "not counted")
    *_, known, unknown = as_markdown(cost_table(rows)).splitlines()
    assert "not counted" in unknown
    assert "not counted" not in known
    assert "| >" in unknown


def test_what_is_no_method_is_refused(corner):
    class Nameless(vlmprune.methods.InputMethod):
        pass

    class Rootless(vlmprune.methods.Method):
        name = "rootless"

    class Uniform(vlmprune.methods.InputMethod):
        name = "uniform"

    for cls, words in ((Nameless, "no `name"), (Rootless, "derive it from"), (int, "is no method")):
        with pytest.raises(ParameterError, match=words):
            registry.register(cls)
    with pytest.raises(ParameterError, match="take another name"):
        registry.register(Uniform)
    assert registry.register(corner) is corner
    with pytest.raises(ParameterError, match="derive it from"):
        vlmprune.apply(LLAVA_CLIP_GQA.build(torch.float32), Rootless)
