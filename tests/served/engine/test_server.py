"""The OpenAI server: six requests at once, twice; its metrics; and that it does not start with what it cannot serve."""

from __future__ import annotations

import base64
import io
import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager

import pytest

from support.served import CHECKPOINTS, NEW_TOKENS, Reference, scene_prompts

FOLDER = CHECKPOINTS / "tiny-qwen2.5-vl"
SETTING = {"method": "fastervlm", "keep": 0.25}
SECONDS = 600


def command(setting, port=8000, *flags):
    return [
        *(sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(FOLDER), "--port", str(port)),
        *("--host", "127.0.0.1", "--dtype", "float32", "--block-size", "32", "--max-model-len", "2048"),
        *("--enforce-eager", "--hf-overrides", json.dumps({"vlmprune": setting}), *flags),
    ]


def environment():
    return {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@contextmanager
def running_server(log):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as output:
        process = subprocess.Popen(
            command(SETTING, port), stdout=output, stderr=subprocess.STDOUT, env=environment(), start_new_session=True
        )
        try:
            wait_until_ready(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def wait_until_ready(process, port, log):
    end = time.monotonic() + SECONDS
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()[-3000:]
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(1)
    raise TimeoutError(log.read_text()[-3000:])


def asked(address, prompt):
    file = io.BytesIO()
    prompt.pictures[0].save(file, "PNG")
    picture = f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"
    content = [{"type": "image_url", "image_url": {"url": picture}}, {"type": "text", "text": prompt.question}]
    body = {
        "model": str(FOLDER),
        "messages": [{"role": "user", "content": content}],
        "max_tokens": NEW_TOKENS,
        "temperature": 0,
        # The processor of the checkpoint adds them, too.
        "add_special_tokens": True,
    }
    request = urllib.request.Request(
        f"{address}/v1/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=SECONDS) as answer:
        return json.load(answer)["choices"][0]["message"]["content"]


def test_six_requests_at_once(tmp_path):
    host = Reference(FOLDER)
    prompts = scene_prompts(6, tall=(0, 240, 336))
    answers = host.answers(prompts, **SETTING)
    wanted = [host.processor.decode(tokens, skip_special_tokens=True).strip() for tokens in answers.tokens]
    log = tmp_path / "server.log"
    with running_server(log) as address, ThreadPoolExecutor(6) as pool:
        for _ in range(2):
            given = list(pool.map(lambda prompt: asked(address, prompt), prompts))
            assert [text.strip() for text in given] == wanted
        with urllib.request.urlopen(f"{address}/metrics", timeout=30) as page:
            metrics = page.read().decode()
    values = {
        line.split()[0].removeprefix("vlmprune_"): float(line.split()[1])
        for line in metrics.splitlines()
        if line.startswith("vlmprune_") and "_created" not in line
    }
    assert values["images_total"] >= 2 * len(prompts)
    after, before = values["visual_tokens_after_total"], values["visual_tokens_before_total"]
    assert before > 0
    assert after == pytest.approx(0.25 * before, rel=0.02)
    assert "prunes the images of this Qwen2.5-VL model" in log.read_text()
    assert "visual tokens before and" in log.read_text()


def test_a_server_that_cannot_prune_does_not_start():
    ended = subprocess.run(
        command({"method": "divprun", "keep": 0.25}), capture_output=True, text=True, timeout=SECONDS, env=environment()
    )
    assert ended.returncode != 0
    assert "Did you mean 'divprune'" in ended.stderr + ended.stdout
