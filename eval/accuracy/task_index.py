"""Finding tasks by name: the embedded ones, a user's own folder, and everything lmms-eval ships."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any
from unittest import mock

import datasets
import lmms_eval.tasks
from lmms_eval.api.task import ConfigurableTask
from lmms_eval.tasks import TaskManager, get_task_dict
from tenacity import RetryError, stop_after_attempt

from vlmprune.errors import UnknownNameError, UnsupportedCallError, VlmpruneError

EMBEDDED = Path(__file__).parents[1] / "tasks"
EMBEDDED_TASKS = tuple(f"scenes_{name}" for name in ("attribute", "existence", "counting", "relation", "reading"))
VIDEO_TASKS = tuple(f"video_{name}" for name in ("motion", "order", "counting", "reading", "happened"))
NAMED_GROUPS = {"all": EMBEDDED_TASKS, "video": VIDEO_TASKS}
"""What stands for several of the embedded tasks: those on pictures, those on clips."""
PROMPT_NAMES = {"llava": "llava_hf", "llava_next": "llava_hf"}
"""lmms-eval's name for a model type where the two differ; tasks keep prompts by that name."""
OUTPUT_TYPES = {"generate_until": "chat", "multiple_choice": "simple", "loglikelihood": "simple"}
"""What a task may ask for, and the lmms-eval protocol that can express it."""


class TaskLoadError(VlmpruneError, RuntimeError):
    """A task exists, but its data or code cannot be loaded."""


def find_tasks(names: Sequence[str], model_type: str, folders: Sequence[str] = ()) -> dict[str, Any]:
    """Loaded lmms-eval task objects by name, in the order asked for.

    lmms-eval's own index, which takes seconds to build, is only read when a name is found nowhere else.

    Args:
        names: tasks, tags and groups; "all" stands for the embedded tasks on pictures, "video" for those on clips.
        model_type: by which lmms-eval's tasks choose their prompts.
        folders: further folders of tasks.

    Raises:
        UnknownNameError: a name is nowhere.
        TaskLoadError: its data cannot be had.
    """
    prompts = PROMPT_NAMES.get(model_type, model_type)
    paths = [str(EMBEDDED), *map(str, folders)]
    manager = TaskManager(include_path=paths, include_defaults=False, model_name=prompts)
    wanted = [name for asked in names for name in NAMED_GROUPS.get(asked, (asked,))]
    if not wanted:
        raise UnknownNameError(f"No task is named. Allowed: {', '.join(_embedded())}, or any of lmms-eval's.")
    missing = [name for name in wanted if name not in manager.all_tasks]
    if missing:
        texts = shipped_task_texts()
        for name in missing:
            if not any(re.search(rf"(?<![\w-]){re.escape(name)}(?![\w-])", text) for text in texts):
                raise unknown_task(name, [*manager.all_tasks, *declared_names(texts)])
        manager = TaskManager(include_path=paths, include_defaults=True, model_name=prompts)
    for name in missing:
        if name not in manager.all_tasks:
            raise unknown_task(name, manager.all_tasks)
    tasks: dict[str, Any] = {}
    reasons: dict[str, str] = {}
    with _no_second_tries_offline():
        for name in wanted:
            try:
                tasks.update(_load(manager, name))
            except VlmpruneError:
                raise
            except Exception as error:
                cause = error.last_attempt.exception() if isinstance(error, RetryError) else error
                first, *_ = [*str(cause).strip().splitlines(), ""]
                reasons[name] = f"{type(cause).__name__}: {first}"
    if len(reasons) == 1:
        ((name, reason),) = reasons.items()
        raise TaskLoadError(f"Task {name!r} cannot be loaded (does its data need a network?): {reason}")
    if reasons:
        listed = "; ".join(f"{name} ({reason})" for name, reason in reasons.items())
        there = f" Allowed as they are: --tasks {','.join(tasks)}." if tasks else ""
        raise TaskLoadError(
            f"{len(reasons)} of {len(wanted)} tasks cannot be loaded (does their data need a network?): {listed}.{there}"
        )
    return tasks


@contextmanager
def _no_second_tries_offline() -> Iterator[None]:
    """A context in which a download is tried once where no network may be used; lmms-eval tries five times, with pauses."""
    retry = getattr(ConfigurableTask.download, "retry", None)
    if retry is None or not datasets.config.HF_HUB_OFFLINE:
        yield
        return
    with mock.patch.object(retry, "stop", stop_after_attempt(1)):
        yield


def unknown_task(name: str, known: Sequence[str]) -> UnknownNameError:
    """The error for a task that does not exist, with the nearest names and not all thousands of them."""
    near = get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f" Did you mean {' or '.join(map(repr, near))}?" if near else ""
    allowed = ", ".join(_embedded())
    return UnknownNameError(
        f"Unknown task {name!r}.{hint} Allowed: {allowed}, and the {len(known)} tasks lmms-eval knows."
    )


def _embedded() -> list[str]:
    return [*NAMED_GROUPS, *EMBEDDED_TASKS, *VIDEO_TASKS]


def shipped_task_texts() -> list[str]:
    """The text of every task file of lmms-eval; reading them takes a fraction of the seconds that its own index takes."""
    folder = Path(lmms_eval.tasks.__file__).parent
    return [path.read_text(encoding="utf-8", errors="replace") for path in folder.rglob("*.yaml")]


def declared_names(texts: Iterable[str]) -> list[str]:
    """Names of tasks and groups in task files, found without parsing them."""
    found = (re.findall(r"^(?:task|group):[ \t]*[\"']?([\w.-]+)", text, re.MULTILINE) for text in texts)
    return sorted({name for names in found for name in names})


def _load(manager: TaskManager, name: str) -> dict[str, Any]:
    loaded = _leaves(get_task_dict([name], manager, "chat"))
    for leaf, task in loaded.items():
        kind = task.OUTPUT_TYPE
        if kind not in OUTPUT_TYPES:
            raise UnsupportedCallError(f"Task {leaf!r} is of type {kind!r}; allowed: {', '.join(OUTPUT_TYPES)}.")
        if OUTPUT_TYPES[kind] == "simple":
            loaded.update(_leaves(get_task_dict([leaf], manager, "simple")))
    return loaded


def _leaves(tasks: dict[Any, Any]) -> dict[str, Any]:
    leaves: dict[str, Any] = {}
    for name, task in tasks.items():
        leaves.update(_leaves(task) if isinstance(task, dict) else {str(name): task})
    return leaves


def documents_of(task: Any) -> Any:
    """The records that a task asks about."""
    return task.test_docs() if task.has_test_docs() else task.validation_docs()


def data_identity(task: Any) -> dict[str, Any]:
    """What decides a task's items and scores: version, number of documents, the dataset's own checksum."""
    documents = documents_of(task)
    files = (task.config.dataset_kwargs or {}).get("data_files")
    sizes = {os.path.basename(path): os.path.getsize(path) for path in _paths(files)}
    return {"version": task.VERSION, "documents": len(documents), "files": sizes}


def _paths(files: Any) -> list[str]:
    if isinstance(files, str):
        return [files] if os.path.isfile(files) else []
    parts = files.values() if isinstance(files, dict) else files or []
    return [path for part in parts for path in _paths(part)]
