"""What vLLM's server is started with. The server itself is tested where vLLM is installed."""

from __future__ import annotations

import json

import pytest

from vlmprune.errors import ParameterError, UnsupportedCallError, UnsupportedMethodError
from vlmprune.eval.models.names import resolve_model
from vlmprune.eval.run.cells import Cell, one_cell
from vlmprune.patches.vllm.settings import made_method
from vlmprune.serving import vllm_server


@pytest.fixture
def tested_version(monkeypatch):
    monkeypatch.setattr(vllm_server, "installed_version", lambda: "0.32.0")


@pytest.mark.usefixtures("tested_version")
@pytest.mark.parametrize(
    ("method", "keep"), [("divprune", "0.25"), ("vtc_cls:start_layer=3", "64"), ("random:seed=3", None)]
)
def test_the_plug_in_reads_the_method_that_was_asked_for(method, keep):
    cell = one_cell(method, keep)
    arguments = vllm_server.server_arguments("tiny-llava", cell, ["--port", "8001"])
    assert arguments[:6] == ["-m", vllm_server.MODULE, "--model", resolve_model("tiny-llava"), "--port", "8001"]
    setting = json.loads(arguments[arguments.index("--hf-overrides") + 1])["vlmprune"]
    assert made_method(setting) == cell.make_method()


def test_without_a_method_the_server_is_vllm_s_own():
    arguments = vllm_server.server_arguments("tiny-llava", Cell(), ["--port", "8001"])
    assert arguments == ["-m", vllm_server.MODULE, "--model", resolve_model("tiny-llava"), "--port", "8001"]


@pytest.mark.usefixtures("tested_version")
@pytest.mark.parametrize("flag", ["--hf-overrides", "--hf_overrides={}"])
def test_two_overrides_are_refused(flag):
    with pytest.raises(ParameterError, match="allowed: one of them"):
        vllm_server.server_arguments("tiny-llava", Cell("divprune", 0.25), [flag])


@pytest.mark.usefixtures("tested_version")
def test_a_method_that_vllm_cannot_serve_is_refused_before_it_starts():
    with pytest.raises(UnsupportedMethodError, match="'fastv' cannot be served by vLLM"):
        vllm_server.server_arguments("tiny-llava", Cell("fastv", 0.5), [])


def test_another_version_is_refused(monkeypatch):
    monkeypatch.setattr(vllm_server, "installed_version", lambda: "0.99.1")
    with pytest.raises(UnsupportedCallError, match=r"0\.99\.1 was not tested"):
        vllm_server.server_arguments("tiny-llava", Cell("divprune", 0.25), [])
