"""Every picture of a run is decoded once before the run, so that a bad one is named at the start and not after an hour."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any
from unittest import mock

from PIL import ImageFile

from .prompts import Prompt, PromptDataError
from .questions import PictureError, to_image
from .task_index import documents_of


def check_prompts(prompts: Iterable[Prompt], on_progress: Callable[[int], Any] = lambda count: None) -> None:
    """Decode the pictures of prompts; pictures that several prompts share once.

    Raises:
        PromptDataError: one cannot be decoded; names file and prompt.
    """
    seen: set[str] = set()
    for number, prompt in enumerate(prompts, start=1):
        for path in prompt.images:
            if path not in seen:
                seen.add(path)
                try:
                    with refusing_torn_pictures():
                        to_image(path)
                except PictureError as error:
                    raise PromptDataError(f"Item {number} ({prompt.text[:40]!r}): {error}") from error
        on_progress(1)


def check_tasks(
    tasks: Mapping[str, Any], limit: int | None, on_progress: Callable[[int], Any] = lambda count: None
) -> None:
    """Decode the pictures of the items of lmms-eval tasks that a run answers.

    Raises:
        PromptDataError: one cannot be decoded; names task and item.
    """
    for name, task in tasks.items():
        documents = documents_of(task)
        count = len(documents) if limit is None else min(limit, len(documents))
        for number in range(count):
            try:
                with refusing_torn_pictures():
                    for visual in task.doc_to_visual(documents[number]) or []:
                        if not isinstance(visual, (str, dict)) or str(visual).lower().endswith(PICTURE_ENDINGS):
                            to_image(visual)
            except (PictureError, OSError, SyntaxError, ValueError) as error:
                raise PromptDataError(f"Task {name!r}, item {number}: {' '.join(str(error).split())}") from error
            on_progress(1)


@contextmanager
def refusing_torn_pictures() -> Iterator[None]:
    """A context in which Pillow raises for truncated files; some of lmms-eval's tasks tell it to fill them up with grey."""
    with mock.patch.object(ImageFile, "LOAD_TRUNCATED_IMAGES", False):
        yield


PICTURE_ENDINGS = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff")
