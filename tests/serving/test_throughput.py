"""`vlmprune throughput`: what it sends, what it computes, and what it says of servers that fail."""

from __future__ import annotations

import csv
import json
import sys
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import pytest
from typer.testing import CliRunner

from support import stub_server
from support.stub_server import PIECE_SECONDS, StubServer

if find_spec("openai") is None:
    pytest.skip("the extra serve is not installed", allow_module_level=True)

from vlmprune import cli
from vlmprune.eval.throughput.client import Answer
from vlmprune.eval.throughput.command import ThroughputOptions, run_throughput
from vlmprune.eval.throughput.load import run_level, summarised
from vlmprune.eval.throughput.metrics import read_counts
from vlmprune.eval.throughput.prompts import Prompts
from vlmprune.eval.throughput.server_process import ServerError, ServerProcess, free_port
from vlmprune.eval.throughput.settings import Server, running_servers

PROMPTS = Prompts("What?", ((32, 32), (48, 32)), 2, 3, {"ignore_eos": True})
NAMES = ("images", "visual_tokens_before", "visual_tokens_after")


def options(**changes) -> ThroughputOptions:
    return ThroughputOptions(
        **{"prompts": PROMPTS, "concurrency": (1, 3), "requests_per_client": 2, "warm_up": 1, **changes}
    )


def run(*arguments: str):
    return CliRunner().invoke(cli.app, ["throughput", *arguments])


def plain(text: str) -> str:
    return " ".join(text.replace("│", " ").split())


def test_every_setting_gets_the_same_requests_and_no_picture_comes_twice(tmp_path):
    with StubServer() as first, StubServer() as second:
        servers = running_servers([f"full={first.address}", f"pruned={second.address}/v1/"], None)
        rows = run_throughput(servers, "stub", options(together=True, out=tmp_path / "out"))
    assert first.requests[:3] == second.requests[:3]
    for server in (first, second):
        assert len(server.requests) == 1 + 2 + 6
        assert server.most_under_way == 3
        shown = [part["image_url"]["url"] for body in server.requests for part in body["messages"][0]["content"][:-1]]
        assert len(set(shown)) == len(shown) == 2 * 9
        assert {body["model"] for body in server.requests} == {"stub"}
        assert all(body["max_tokens"] == 3 and body["stream"] and body["ignore_eos"] for body in server.requests)
    assert [(row.setting, row.level.concurrency, row.level.requests) for row in rows] == [
        ("full", 1, 2), ("full", 3, 6), ("pruned", 1, 2), ("pruned", 3, 6),
    ]  # fmt: skip
    for row in rows:
        assert row.level.ttft["median"] >= PIECE_SECONDS
        assert 0 < row.level.inter_token["median"] <= row.level.inter_token["p95"]
        assert (row.level.prompt_tokens, row.level.new_tokens) == (600, 3)
        assert row.level.requests_per_second == pytest.approx(row.level.requests / row.level.seconds)
    assert [row.faster is None for row in rows] == [True, True, False, False]
    with (tmp_path / "out" / "throughput.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [(line["setting"], line["concurrency"]) for line in lines] == [
        (r.setting, str(r.level.concurrency)) for r in rows
    ]
    assert float(lines[3]["ttft_seconds_p95"]) == pytest.approx(rows[3].level.ttft["p95"], rel=1e-4)
    table = (tmp_path / "out" / "throughput.md").read_text()
    assert table.count("| `pruned` |") == 2
    assert json.loads((tmp_path / "out" / "throughput.json").read_text())["machine"]["cpu"]


def test_figures_are_those_of_the_answers():
    answers = [
        Answer(10.0, (10.5, 10.6, 10.9), 11.0, 100, 3),
        Answer(10.0, (11.0, 11.2), 12.0, 200, 2),
        Answer(11.0, (11.1,), 14.0, None, None),
    ]
    level = summarised(answers, 2)
    assert (level.seconds, level.requests, level.requests_per_second) == (4.0, 3, 0.75)
    assert level.new_tokens_per_second == 5 / 4
    assert level.ttft == pytest.approx({"median": 0.5, "p95": 0.95})
    assert level.inter_token == pytest.approx({"median": 0.2, "p95": 0.29})
    assert (level.prompt_tokens, level.new_tokens) == (150, 2.5)
    assert summarised(answers[2:], 1).inter_token is None


@pytest.mark.parametrize(
    ("behaviour", "message"),
    [
        ("refuses", "status 500: .*out of memory on device 3"),
        ("fails_in_the_stream", "an error in the stream: the cache is full"),
        ("breaks_off", "the answer broke off after 1 pieces of text"),
        ("says_nothing", "an answer without text, ended by 'stop'"),
        ("speaks_gibberish", "not understood"),
        ("sleeps", "no answer in time"),
        ("nameless", "names no model"),
    ],
)
def test_an_answer_that_is_none_ends_the_measurement_and_is_told(behaviour, message):
    with StubServer(behaviour) as server, pytest.raises(ServerError, match=message) as told:
        run_throughput(
            running_servers([f"mine={server.address}"], None), "stub", options(timeout_seconds=0.5, warm_up=0)
        )
    assert behaviour == "nameless" or f"mine at {server.address}, 1 client" in str(told.value)


def test_nobody_there():
    server = Server("mine", model="stub", address=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(ServerError, match=r"mine at .*the connection failed"):
        run_throughput([server], "stub", options())


@contextmanager
def own_stub(behaviour: str):
    port = free_port()
    process = ServerProcess(behaviour, [sys.executable, stub_server.__file__, behaviour, str(port)], port)
    try:
        process.wait(60)
        yield process
    finally:
        process.stop()


def test_a_server_that_dies_under_a_request_is_told_with_its_last_words(monkeypatch):
    with own_stub("sleeps") as process:
        server = Server("mine", model="stub", start=lambda: _given(process))
        monkeypatch.setattr("vlmprune.eval.throughput.command.run_level", _killing(process))
        with pytest.raises(ServerError, match="The server of sleeps ended with exit code -9"):
            run_throughput([server], "stub", options())


@contextmanager
def _given(process):
    yield process


def _killing(process):
    """Return `run_level` under which the server is killed while it works on a request."""

    def run(*arguments):
        killer = threading.Timer(0.5, process._process.kill)
        killer.start()
        try:
            return run_level(*arguments)
        finally:
            killer.join()

    return run


def test_a_server_that_does_not_start_is_told_with_what_it_printed():
    port = free_port()
    process = ServerProcess("mine", [sys.executable, "-c", "print('no such model'); raise SystemExit(2)"], port)
    with pytest.raises(ServerError, match=r"mine ended with exit code 2(?s:.*)no such model"):
        process.wait(60)
    process.stop()


def test_a_server_that_is_never_ready_is_given_up_and_stopped():
    port = free_port()
    process = ServerProcess(
        "deaf", [sys.executable, "-c", "import time; print('loading', flush=True); time.sleep(600)"], port
    )
    try:
        with pytest.raises(ServerError, match=r"not ready after 2 s(?s:.*)loading"):
            process.wait(2)
    finally:
        process.stop()
    assert process._process.poll() is not None


def counted(images: int, before: int, after: int) -> str:
    return "\n".join(
        f"vlmprune_{name}_total {value}" for name, value in zip(NAMES, (images, before, after), strict=True)
    )


@pytest.mark.parametrize(
    ("metrics", "message"),
    [
        ("", "counts no pruned images"),
        (counted(9, 9, 9), "counts no pruned images"),
    ],
)
def test_a_server_that_should_prune_and_counts_nothing_is_refused(metrics, message):
    with StubServer(metrics=metrics) as server, pytest.raises(ServerError, match=message):
        run_throughput([Server("mine", 0.25, "stub", server.address, must_drop=True)], "stub", options())


def test_a_server_that_drops_nothing_is_refused():
    class Counting(StubServer):
        """Counts 100 visual tokens a request, before and after."""

        @property
        def metrics(self) -> str:
            return counted(len(self.requests), 100 * len(self.requests), 100 * len(self.requests))

        @metrics.setter
        def metrics(self, text: str) -> None:
            pass

    with Counting() as server, pytest.raises(ServerError, match="dropped none of 200 visual tokens"):
        run_throughput([Server("mine", 0.25, "stub", server.address, must_drop=True)], "stub", options())


def test_counters_are_summed_over_labels():
    lines = 'vlmprune_images_total{engine="0"} 2.0\nvlmprune_images_total{engine="1"} 1.0\n'
    lines += "vlmprune_visual_tokens_before_total 1728.0\nvlmprune_visual_tokens_after_total 432.0\n"
    with StubServer(metrics=lines) as server:
        counts = read_counts(server.address)
    assert (counts.images, counts.before, counts.after) == (3, 1728, 432)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "Name one of --model, --random-weights and --url"),
        (("--model", "tiny-llava", "--methods", "divprun"), "Did you mean 'divprune'"),
        (("--model", "tiny-llava", "--keep", "2.0"), "keep=2.0"),
        (("--model", "tiny-lava"), "tiny-lava"),
        (("--model", "tiny-llava", "--engine", "transformer"), "Did you mean 'transformers'"),
        (("--random-weights", "llava-160"), "Did you mean 'llava-160m'"),
        (("--model", "tiny-llava", "--concurrency", "0,2"), "--concurrency"),
        (("--model", "tiny-llava", "--extra-body", "[1]"), "allowed: a JSON object"),
        (("--model", "tiny-llava", "--extra-body", "{"), "no JSON"),
        (("--url", "localhost:8000"), "allowed: a name and an address"),
        (("--url", "a=http://localhost:1", "--url", "a=http://localhost:2"), "each needs its own"),
        (("--url", "a=http://localhost:1", "--random-weights", "llava-160m"), "not for --url"),
    ],
)
def test_what_the_user_got_wrong_is_one_clear_message(arguments, message, tmp_path):
    result = run(*arguments, "--out", str(tmp_path / "out"))
    assert result.exit_code == 2, result.output
    assert message in plain(result.output)
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


@pytest.mark.skipif(find_spec("fastapi") is None, reason="the extra serve is not installed")
def test_transformers_serve_with_and_without_pruning_in_one_run(tmp_path):
    result = run(
        *(
            "--model",
            "tiny-llava",
            "--methods",
            "divprune",
            "--keep",
            "0.25",
            "--concurrency",
            "1,2",
            "--requests",
            "2",
        ),
        *("--new-tokens", "4", "--warm-up", "1", "--engine", "transformers"),
        *("--server-flags", "--device cpu --dtype float32", "--wait", "400", "--out", str(tmp_path)),
    )
    assert result.exit_code == 0, result.output
    rows = json.loads((Path(tmp_path) / "throughput.json").read_text())["rows"]
    assert [(row["setting"], row["keep"], row["level"]["concurrency"]) for row in rows] == [
        ("full", None, 1), ("full", None, 2), ("divprune", 0.25, 1), ("divprune", 0.25, 2),
    ]  # fmt: skip
    assert [(row["visual_before"], row["visual_after"]) for row in rows] == [(None, None)] * 2 + [(576, 144)] * 2
    assert all(row["level"]["new_tokens"] == 4 and row["level"]["prompt_tokens"] > 576 for row in rows)
    assert "576 to 144" in result.output
