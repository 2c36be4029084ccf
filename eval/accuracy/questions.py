"""Requests of lmms-eval as conversations with their pictures."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from vlmprune.errors import UnsupportedCallError


@dataclass
class Question:
    """One request as a conversation: `messages` with placeholders, `images` in order."""

    position: int
    task: str
    doc_id: int
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    counted: bool
    continuation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def generation_question(position: int, request: Instance, tasks: Mapping[str, Any]) -> Question:
    """A request for generated text; `tasks` are the documents by task and split."""
    first, second, third, doc_id, task, split = request.args
    doc = tasks[task][split][doc_id]
    if callable(second):
        messages, images = from_lmms_messages(second(doc))
        settings = third
    else:
        messages, images = user_turn(first, third(doc))
        settings = second
    counted = not request.metadata.get("__padding_only__", False)
    return Question(position, task, doc_id, messages, images, counted, settings=dict(settings))


def scoring_question(position: int, request: Instance, tasks: Mapping[str, Any]) -> Question:
    """A request for the likelihood of a continuation.

    Raises:
        UnsupportedCallError: the request has no document.
    """
    if len(request.args) != 6:
        raise UnsupportedCallError("Log-likelihood without a document (acc_mutual_info) is not supported.")
    context, continuation, to_visual, doc_id, task, split = request.args
    doc = tasks[task][split][doc_id]
    messages, images = user_turn(context, to_visual(doc))
    counted = not request.metadata.get("__padding_only__", False)
    text = continuation(doc) if callable(continuation) else continuation
    return Question(position, task, doc_id, messages, images, counted, continuation=str(text))


def batches_of(questions: Iterator[Question], size: int) -> Iterator[list[Question]]:
    """Batches of neighbouring questions whose generation settings agree."""
    batch: list[Question] = []
    for question in questions:
        if batch and (len(batch) == size or _key(question) != _key(batch[0])):
            yield batch
            batch = []
        batch.append(question)
    if batch:
        yield batch


def _key(question: Question) -> str:
    return json.dumps(question.settings, sort_keys=True, default=str)


def user_turn(text: str, visuals: Sequence[Any] | None) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """A conversation of one user turn, pictures before the text."""
    images = [to_image(visual) for visual in visuals or []]
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}], images


def from_lmms_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """lmms-eval's chat messages as Hugging Face messages with placeholders, and their pictures in order."""
    result, images = [], []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                content.append({"type": "image"})
                images.append(to_image(part["url"]))
            else:
                raise UnsupportedCallError(f"Content of type {part['type']!r} is not supported; allowed: text, image.")
        result.append({"role": message["role"], "content": content})
    return result, images


def to_image(visual: Any) -> Image.Image:
    """A picture, or the path of one, in RGB."""
    if isinstance(visual, str):
        visual = Image.open(visual)
    if not isinstance(visual, Image.Image):
        raise UnsupportedCallError(
            f"A visual of type {type(visual).__name__!r} is not supported; allowed: picture or path."
        )
    return visual.convert("RGB")
