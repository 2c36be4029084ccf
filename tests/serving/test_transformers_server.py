"""`transformers serve` with a pruned model: what it answers to several clients at once, and what it refuses to start with."""

from __future__ import annotations

import base64
import io
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from importlib.util import find_spec

import pytest
import torch
from PIL import Image, ImageDraw
from typer.testing import CliRunner

import vlmprune
from vlmprune import cli
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.names import resolve_model
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.throughput.metrics import read_counts
from vlmprune.eval.throughput.server_process import started

pytestmark = pytest.mark.skipif(
    any(find_spec(name) is None for name in ("fastapi", "uvicorn", "openai", "prometheus_client", "accelerate")),
    reason="the extra serve is not installed",
)
MODEL, KEEP, NEW_TOKENS = "tiny-llava-next", 0.25, 6
CELL = Cell("divprune", KEEP)


@pytest.fixture(scope="module")
def server():
    flags = ("--device", "cpu", "--dtype", "float32")
    with started(CELL, MODEL, "transformers", flags, wait_seconds=400) as running:
        yield running


def picture(number: int) -> Image.Image:
    """Return a picture of its own size with a circle of its own colour."""
    image = Image.new("RGB", (112 + 28 * number, 140), "white")
    colour = ("red", "green", "blue", "yellow", "purple", "orange")[number]
    ImageDraw.Draw(image).ellipse((20, 30, 80 + 4 * number, 100), fill=colour)
    return image


def data_url(image: Image.Image) -> str:
    out = io.BytesIO()
    image.save(out, "PNG")
    return "data:image/png;base64," + base64.b64encode(out.getvalue()).decode()


def messages(*numbers: int, url: bool) -> list[dict]:
    shown = (
        {"type": "image_url", "image_url": {"url": data_url(picture(number))}}
        if url
        else {"type": "image", "image": picture(number)}
        for number in numbers
    )
    return [{"role": "user", "content": [*shown, {"type": "text", "text": "What color is the circle?"}]}]


REQUESTS = [(0,), (1,), (2, 3), (4,), (), (5, 0)]


@pytest.fixture(scope="module")
def alone():
    """What the pruned model answers to each request without a server."""
    loaded = load_model(MODEL, "float32", "cpu")
    answers, before, after = [], 0, 0
    with torch.inference_mode(), vlmprune.pruned(loaded.model, CELL.method, KEEP):
        for numbers in REQUESTS:
            inputs = loaded.processor.apply_chat_template(
                messages(*numbers, url=False), add_generation_prompt=True, tokenize=True, return_dict=True,
                return_tensors="pt",
            )  # fmt: skip
            out = loaded.model.generate(**inputs, max_new_tokens=NEW_TOKENS, do_sample=False)
            answers.append(loaded.processor.decode(out[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
            if numbers:
                images = vlmprune.last_run(loaded.model).images
                before += sum(image.total for image in images)
                after += sum(len(image.kept) for image in images)
    return answers, before, after


def ask(server, numbers: tuple[int, ...], stream: bool) -> str:
    import openai

    client = openai.OpenAI(base_url=f"{server.address}/v1", api_key="none", max_retries=0, timeout=300)
    given = {"max_tokens": NEW_TOKENS, "temperature": 0, "stream": stream}
    answer = client.chat.completions.create(model=resolve_model(MODEL), messages=messages(*numbers, url=True), **given)
    if not stream:
        return answer.choices[0].message.content
    return "".join(chunk.choices[0].delta.content or "" for chunk in answer)


def test_requests_at_once_are_answered_as_the_pruned_model_answers_them_alone(server, alone):
    expected, before, after = alone
    earlier = read_counts(server.address)
    with ThreadPoolExecutor(len(REQUESTS)) as clients:
        streamed = [index % 2 == 1 for index in range(len(REQUESTS))]
        answers = list(clients.map(lambda part: ask(server, *part), zip(REQUESTS, streamed, strict=True)))
    assert answers == expected
    counts = read_counts(server.address).since(earlier)
    assert (counts.images, counts.before, counts.after) == (sum(map(len, REQUESTS)), before, after)
    assert after < before / 3


def test_a_model_that_is_loaded_again_is_pruned_again(server, alone):
    urllib.request.urlopen(urllib.request.Request(f"{server.address}/reset", method="POST"), timeout=300).close()
    earlier = read_counts(server.address)
    with ThreadPoolExecutor(2) as clients:
        answers = list(clients.map(lambda number: ask(server, REQUESTS[number], False), (0, 1)))
    assert answers == alone[0][:2]
    counts = read_counts(server.address).since(earlier)
    assert counts.images == 2
    assert counts.after < counts.before / 3


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("tiny-llava", "--engine", "transformer"), "Did you mean 'transformers'"),
        (("tiny-llava", "--method", "divprun"), "Did you mean 'divprune'"),
        (("tiny-llava", "--method", "random:sed=1"), "Did you mean 'seed'"),
        (("tiny-llava", "--method", "pool,random"), "names 2 methods; allowed: one"),
        (("tiny-llava", "--method", "divprune", "--keep", "1.5"), "keep=1.5"),
        (("tiny-llava", "--method", "divprune", "--keep", "0.5,0.25"), "names 2 budgets; allowed: one"),
        (("tiny-llava", "--keep", "0.5"), "--keep needs --method"),
        (("tiny-lava", "--method", "divprune"), "tiny-lava"),
        (("./no/such/folder", "--method", "divprune"), "does not exist"),
        (("tiny-llava", "--method", "divprune", "--prot", "8000"), "No such option: --prot"),
        (("tiny-llava", "--method", "globalcom2", "--device", "cpu"), "globalcom2"),
    ],
)
def test_the_server_refuses_to_start_and_says_why(arguments, message):
    result = CliRunner().invoke(cli.app, ["serve", "--engine", "transformers", *arguments])
    assert result.exit_code == 2, result.output
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
