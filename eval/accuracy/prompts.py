"""Prompts without labels: a folder of pictures, or a file of questions about pictures."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vlmprune.errors import VlmpruneError

PICTURES = frozenset({".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff"})
DEFAULT_PROMPT = "Describe this image."


class PromptDataError(VlmpruneError, ValueError):
    """The folder or file of prompts cannot be used."""


@dataclass(frozen=True)
class Prompt:
    """A question about pictures (paths), with the answers that are right and the choices that there are, where they are known."""

    text: str
    images: tuple[str, ...]
    answers: tuple[str, ...] = ()
    choices: tuple[str, ...] = ()


def read_prompts(path: Path, limit: int | None = None) -> list[Prompt]:
    """Prompts of a folder of pictures (all asked `DEFAULT_PROMPT`, or the lines of its `prompts.txt`) or of a JSONL file.

    A line of the file is `{"image": path or list of paths, "prompt": text}`; relative paths start at the file's folder. It may
    hold an `answer` (text or list of texts) and `choices` (list of texts, of which the answer is one, or their letter);
    either all lines have an answer or none.

    Raises:
        PromptDataError: a file or line cannot be used; names it.
    """
    if path.is_dir():
        return _folder_prompts(path)[:limit]
    if not path.is_file():
        raise PromptDataError(f"--data {str(path)!r} does not exist; allowed: a folder of pictures or a .jsonl file.")
    prompts = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            prompts.append(_line_prompt(line, path, number))
    if not prompts:
        raise PromptDataError(f"--data {str(path)!r} holds no prompts.")
    labelled = [bool(prompt.answers) for prompt in prompts]
    if any(labelled) and not all(labelled):
        raise PromptDataError(
            f"--data {str(path)!r}: {labelled.count(False)} of {len(prompts)} lines have no answer, prompt "
            f"{labelled.index(False) + 1} first; allowed: an answer in every line, or in none."
        )
    return prompts[:limit]


def _folder_prompts(folder: Path) -> list[Prompt]:
    pictures = sorted(str(file) for file in folder.iterdir() if file.suffix.lower() in PICTURES)
    if not pictures:
        raise PromptDataError(f"--data {str(folder)!r} holds no pictures ({', '.join(sorted(PICTURES))}).")
    file = folder / "prompts.txt"
    texts = (
        [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]
        if file.exists()
        else []
    )
    return [Prompt(text, (picture,)) for picture in pictures for text in texts or [DEFAULT_PROMPT]]


def _line_prompt(line: str, file: Path, number: int) -> Prompt:
    place = f"line {number} of {str(file)!r}"
    try:
        content = json.loads(line)
    except ValueError as error:
        raise PromptDataError(f"{place} is no JSON: {error}") from None
    if not isinstance(content, dict) or not isinstance(content.get("prompt"), str):
        raise PromptDataError(f'{place} must be {{"image": path or list of paths, "prompt": text}}.')
    images = content.get("image") or content.get("images") or []
    names = [images] if isinstance(images, str) else images
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise PromptDataError(f'{place} has "image": {json.dumps(images)}; allowed: a path or a list of paths.')
    paths = [str(file.parent / name) for name in names]
    missing = next((name for name in paths if not Path(name).is_file()), None)
    if missing is not None:
        raise PromptDataError(f"{place} names the picture {missing!r}, which does not exist.")
    choices, answers = _texts(content, "choices", place), _texts(content, "answer", place)
    letters = {chr(ord("A") + number): choice for number, choice in enumerate(choices)}
    right = tuple(answer if answer in choices else letters.get(answer.upper(), answer) for answer in answers)
    if choices and not set(right) <= set(choices):
        raise PromptDataError(f'{place} has "answer": {json.dumps(content["answer"])}; allowed: one of its choices.')
    return Prompt(content["prompt"], tuple(paths), right, choices)


def _texts(content: dict[str, Any], name: str, place: str) -> tuple[str, ...]:
    value = content.get(name)
    found = [] if value is None else value if isinstance(value, list) else [value]
    if any(isinstance(each, (dict, list)) or each is None for each in found):
        raise PromptDataError(f'{place} has "{name}": {json.dumps(value)}; allowed: a text or a list of texts.')
    return tuple(str(each) for each in found)


def data_checksum(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Number of prompts and a checksum of their texts and pictures."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(prompt.text.encode())
        if prompt.answers:
            digest.update(json.dumps([prompt.answers, prompt.choices]).encode())
        for path in prompt.images:
            digest.update(Path(path).read_bytes())
    return {"prompts": len(prompts), "sha256": digest.hexdigest()[:16]}
