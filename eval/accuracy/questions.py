"""Requests of lmms-eval as conversations with their pictures and videos."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lmms_eval.api.instance import Instance
from PIL import Image

from vlmprune.errors import UnsupportedCallError

from .videos import MOST_FRAMES, Video, is_video, to_video

PLACEHOLDER = re.compile(r" ?<image>|<\|vision_start\|><\|image_pad\|><\|vision_end\|>|<\|image_pad\|>")
"""Marks for a picture that tasks have in their texts."""


@dataclass(frozen=True)
class Turn:
    """A conversation: `messages` with placeholders, pictures and videos in the order of theirs."""

    messages: list[dict[str, Any]]
    images: list[Image.Image]
    videos: list[Video]


@dataclass
class Question:
    """One request, and the conversation that puts it; `counted` is False for requests that only pad a batch of ranks."""

    position: int
    task: str
    doc_id: int
    turn: Turn
    counted: bool
    continuation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


def is_counted(request: Instance) -> bool:
    """Whether a request is an item, and does not only pad a batch of ranks."""
    return not request.metadata.get("__padding_only__", False)


def generation_question(
    position: int, request: Instance, tasks: Mapping[str, Any], frames: int = MOST_FRAMES
) -> Question:
    """A request for generated text; `tasks` are the documents by task and split, `frames` those read of a video file."""
    first, second, third, doc_id, task, split = request.args
    doc = tasks[task][split][doc_id]
    if callable(second):
        turn = from_lmms_messages(second(doc), frames)
        settings = third
    else:
        messages = _own_messages(third, doc)
        turn = user_turn(first, third(doc), frames) if messages is None else from_lmms_messages(messages, frames)
        settings = second
    counted = is_counted(request)
    return Question(position, task, doc_id, turn, counted, settings=dict(settings))


def _own_messages(to_visual: Any, document: Any) -> list[dict[str, Any]] | None:
    """The messages of a task that makes its own; None where its text and pictures are all.

    lmms-eval's simple protocol does not hand them on, but `to_visual` is a method of the task, which knows them.
    """
    task = getattr(to_visual, "__self__", None)
    make = getattr(getattr(task, "config", None), "doc_to_messages", None)
    if not callable(make):
        return None
    named = getattr(task, "lmms_eval_specific_kwargs", None)
    wanted = inspect.signature(make).parameters
    takes = "lmms_eval_specific_kwargs" in wanted or any(each.kind is each.VAR_KEYWORD for each in wanted.values())
    found: list[dict[str, Any]] = make(document, **({"lmms_eval_specific_kwargs": named} if takes and named else {}))
    return found


def scoring_question(position: int, request: Instance, tasks: Mapping[str, Any], frames: int = MOST_FRAMES) -> Question:
    """A request for the likelihood of a continuation; `frames` are read of a video file.

    Raises:
        UnsupportedCallError: the request has no document.
    """
    if len(request.args) != 6:
        raise UnsupportedCallError("Log-likelihood without a document (acc_mutual_info) is not supported.")
    context, continuation, to_visual, doc_id, task, split = request.args
    doc = tasks[task][split][doc_id]
    turn = user_turn(context, to_visual(doc), frames)
    counted = is_counted(request)
    text = continuation(doc) if callable(continuation) else continuation
    return Question(position, task, doc_id, turn, counted, continuation=str(text))


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


def user_turn(text: str, visuals: Sequence[Any] | None, frames: int = MOST_FRAMES) -> Turn:
    """A conversation of one user turn, pictures and videos before the text; of a video file at most `frames` are read."""
    content: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    videos: list[Video] = []
    for visual in visuals or []:
        content.append(_seen(visual, is_video(visual), images, videos, frames))
    content.append({"type": "text", "text": text})
    return Turn(with_text_placeholders([{"role": "user", "content": content}]), images, videos)


def with_text_placeholders(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Messages in which no text holds a placeholder of its own, which the processor would take for one more picture.

    Where the texts of the conversation hold as many placeholders as there are pictures, the pictures go there, as in
    lmms-eval's own models; otherwise the placeholders in the texts are dropped and the pictures stay where they are.
    """
    texts = [part["text"] for message in messages for part in message["content"] if part["type"] == "text"]
    written = sum(len(PLACEHOLDER.findall(text)) for text in texts)
    if not written:
        return messages
    pictures = sum(part["type"] == "image" for message in messages for part in message["content"])
    return [{**message, "content": _replaced(message["content"], written == pictures)} for message in messages]


def _replaced(content: list[dict[str, Any]], in_place: bool) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    for part in content:
        if part["type"] == "image" and in_place:
            continue
        if part["type"] != "text":
            found.append(part)
        elif not in_place:
            found.append({**part, "text": PLACEHOLDER.sub("", part["text"]).strip()})
        else:
            for place, text in enumerate(PLACEHOLDER.split(part["text"])):
                found += [{"type": "image"}] * bool(place)
                found += [{**part, "text": text.strip("\n") if place else text}] * bool(text.strip())
    return found


def from_lmms_messages(messages: Sequence[dict[str, Any]], frames: int = MOST_FRAMES) -> Turn:
    """lmms-eval's chat messages as Hugging Face messages with placeholders, pictures and videos in order.

    Raises:
        UnsupportedCallError: content of another kind.
    """
    result: list[dict[str, Any]] = []
    images: list[Image.Image] = []
    videos: list[Video] = []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            kind = part["type"]
            if kind == "text":
                content.append({"type": "text", "text": part["text"]})
            elif kind in ("image", "video"):
                content.append(_seen(part["url"], kind == "video", images, videos, frames))
            else:
                raise UnsupportedCallError(f"Content of type {kind!r} is not supported; allowed: text, image, video.")
        result.append({"role": message["role"], "content": content})
    return Turn(with_text_placeholders(result), images, videos)


def _seen(visual: Any, video: bool, images: list[Image.Image], videos: list[Video], frames: int) -> dict[str, Any]:
    """The placeholder of a picture or video, which goes to its list."""
    if video:
        videos.append(to_video(visual, frames))
        return {"type": "video"}
    images.append(to_image(visual))
    return {"type": "image"}


def to_image(visual: Any) -> Image.Image:
    """A picture, or the path of one, in RGB.

    Raises:
        PictureError: it is neither, or cannot be read; one line with the file's name.
    """
    if not isinstance(visual, (str, Path, Image.Image)):
        kind = type(visual).__name__
        raise PictureError(f"A visual of type {kind!r} is not supported; allowed: picture, video or the path of one.")
    name = repr(str(visual)) if isinstance(visual, (str, Path)) else "A picture"
    try:
        return (visual if isinstance(visual, Image.Image) else Image.open(visual)).convert("RGB")
    except Image.DecompressionBombError as error:
        raise PictureError(f"{name} is too large: {' '.join(str(error).split())}") from error
    except (OSError, SyntaxError, ValueError) as error:
        raise PictureError(f"{name} cannot be read: {' '.join(str(error).split())}") from error


class PictureError(UnsupportedCallError):
    """A picture cannot be used."""
