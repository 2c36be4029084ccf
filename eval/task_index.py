"""Finding tasks by name: the embedded ones, a user's own folder, and everything lmms-eval ships."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lmms_eval.tasks import TaskManager, get_task_dict

from vlmprune.errors import UnsupportedCallError, unknown

EMBEDDED = Path(__file__).parent / "tasks"
PROMPT_NAMES = {"llava": "llava_hf", "llava_next": "llava_hf"}
"""lmms-eval's name for a model type where the two differ; tasks keep prompts by that name."""
OUTPUT_TYPES = {"generate_until": "chat", "multiple_choice": "simple", "loglikelihood": "simple"}
"""What a task may ask for, and the lmms-eval protocol that can express it."""


def find_tasks(names: Sequence[str], model_type: str, folders: Sequence[str] = ()) -> dict[str, Any]:
    """Loaded lmms-eval task objects by name, in the order asked for.

    ``names`` may hold tasks, tags and groups; "all" stands for the embedded tasks. lmms-eval's own index, which takes
    seconds to build, is only read when a name is found nowhere else. Raises ``UnknownNameError`` for a name that is
    nowhere.
    """
    prompts = PROMPT_NAMES.get(model_type, model_type)
    paths = [str(EMBEDDED), *map(str, folders)]
    manager = TaskManager(include_path=paths, include_defaults=False, model_name=prompts)
    wanted = [name for asked in names for name in (["scenes"] if asked == "all" else [asked])]
    if any(name not in manager.all_tasks for name in wanted):
        manager = TaskManager(include_path=paths, include_defaults=True, model_name=prompts)
    for name in wanted:
        if name not in manager.all_tasks:
            raise unknown("task", name, ["all", *embedded_tasks(), *manager.all_tasks]) from None
    tasks: dict[str, Any] = {}
    for name in wanted:
        tasks.update(_load(manager, name))
    return tasks


def embedded_tasks() -> list[str]:
    """Names of the tasks that come with vlmprune."""
    return sorted(path.stem for path in EMBEDDED.glob("[!_]*.yaml"))


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


def data_identity(task: Any) -> dict[str, Any]:
    """What decides a task's items and scores: version, number of documents, the dataset's own checksum."""
    documents = task.test_docs() if task.has_test_docs() else task.validation_docs()
    files = (task.config.dataset_kwargs or {}).get("data_files")
    sizes = {os.path.basename(path): os.path.getsize(path) for path in _paths(files)}
    return {"version": task.VERSION, "documents": len(documents), "files": sizes}


def _paths(files: Any) -> list[str]:
    if isinstance(files, str):
        return [files] if os.path.isfile(files) else []
    parts = files.values() if isinstance(files, dict) else files or []
    return [path for part in parts for path in _paths(part)]
