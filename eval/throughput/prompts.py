"""The requests of a measurement: made-up pictures, all different, so that no cache of a server knows them, and a question."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from PIL import Image

from vlmprune.errors import ParameterError

NOISE = 32
"""Width and height of the noise that is stretched to a picture, which then is as large a file as a photograph."""


@dataclass(frozen=True)
class Prompts:
    """Requests by number.

    Attributes:
        question: text behind the pictures.
        image_sizes: width and height of the pictures, in turn.
        images: pictures a request.
        new_tokens: tokens of an answer, at most.
        extra: further fields of the request.
    """

    question: str
    image_sizes: Sequence[tuple[int, int]]
    images: int
    new_tokens: int
    extra: Mapping[str, Any] = field(default_factory=dict)

    def request(self, model: str, number: int) -> dict[str, Any]:
        """Arguments of `chat.completions.create` for request `number`; greedy."""
        size = self.image_sizes[number % len(self.image_sizes)]
        shown = [
            {"type": "image_url", "image_url": {"url": picture_url(size, number * self.images + place)}}
            for place in range(self.images)
        ]
        content = [*shown, {"type": "text", "text": self.question}]
        return {
            "model": model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": self.new_tokens,
            "temperature": 0,
            "extra_body": dict(self.extra),
        }


def picture_url(size: tuple[int, int], seed: int) -> str:
    """A picture of that width and height as a data URL."""
    noise = np.random.default_rng(seed).integers(0, 256, (NOISE, NOISE, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC).save(out, "JPEG", quality=90)
    return "data:image/jpeg;base64," + base64.b64encode(out.getvalue()).decode()


def parse_extra(text: str) -> dict[str, Any]:
    """Further fields of a request from JSON.

    Raises:
        ParameterError: it is no object.
    """
    try:
        found = json.loads(text)
    except ValueError as error:
        raise ParameterError(f"--extra-body {text!r} is no JSON: {error}") from None
    if not isinstance(found, dict):
        raise ParameterError(f'--extra-body {text!r}; allowed: a JSON object like {{"ignore_eos": true}}.')
    return found


def fixed_length(engine: str, new_tokens: int) -> dict[str, Any]:
    """Fields of a request with which an engine answers with so many tokens, whatever the model says."""
    if engine == "vllm":
        return {"ignore_eos": True}
    return {"generation_config": json.dumps({"min_new_tokens": new_tokens, "max_new_tokens": new_tokens})}
