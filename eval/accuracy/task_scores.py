"""One accuracy run through lmms-eval's `simple_evaluate`."""

from __future__ import annotations

import argparse
import importlib
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any
from unittest import mock

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.tasks import TaskManager
from loguru import logger

from vlmprune.errors import VlmpruneError

from .live_model import LiveModel
from .task_index import EMBEDDED


class TaskResultError(VlmpruneError, RuntimeError):
    """A task gave no number that can be compared."""


@dataclass(frozen=True)
class TaskScore:
    """What one task gave: its main metric (name, value, items), all metrics, and each item's answer and score."""

    metric: str
    score: float
    items: int
    higher_is_better: bool
    metrics: dict[str, float]
    samples: list[dict[str, Any]]


def evaluate_tasks(
    model: LiveModel, tasks: Mapping[str, Any], limit: int | None, seed: int
) -> dict[str, TaskScore] | None:
    """Scores by task of `model` as it stands; None on every rank but the first.

    `limit` is the number of items of each task. lmms-eval's response cache stays off: its key does not know how the
    model is pruned.
    """
    with quiet_lmms_eval():
        results = simple_evaluate(
            model=model,
            tasks=list(tasks.values()),
            batch_size=model.batch_size,
            limit=limit,
            log_samples=True,
            bootstrap_iters=0,
            random_seed=seed,
            numpy_random_seed=seed,
            torch_random_seed=seed,
            fewshot_random_seed=seed,
            datetime_str="",
            task_manager=TaskManager(include_path=str(EMBEDDED), include_defaults=False),
            verbosity="WARNING",
            process_docs_parallel=1,
            cli_args=argparse.Namespace(process_with_media=False, output_path=None, reasoning_tags=None),
        )
    if results is None:
        return None
    return {name: _score(name, task, results) for name, task in tasks.items()}


def _score(name: str, task: Any, results: dict[str, Any]) -> TaskScore:
    values = results["results"].get(name, {})
    metrics = {
        key.split(",")[0]: float(value)
        for key, value in values.items()
        if "," in key and "_stderr" not in key and isinstance(value, (int, float)) and math.isfinite(value)
    }
    if not metrics:
        raise TaskResultError(
            f"Task {name!r} reports no number (some tasks only write a file for a server or ask a judge model); "
            f"it reported {sorted(values) or 'nothing'}."
        )
    named = [item["metric"] for item in task.config.metric_list or [] if isinstance(item.get("metric"), str)]
    metric = next((key for key in named if key in metrics), next(iter(metrics)))
    samples = sorted(results["samples"][name], key=lambda sample: sample["doc_id"])
    return TaskScore(
        metric=metric,
        score=metrics[metric],
        items=len(samples),
        higher_is_better=bool(task.higher_is_better().get(metric, True)),
        metrics=metrics,
        samples=[
            {"doc_id": s["doc_id"], "answer": _answer(s["filtered_resps"]), "score": number_of(s.get(metric))}
            for s in samples
        ],
    )


def _answer(responses: list[Any]) -> Any:
    """A generated answer, or the rounded losses of the choices."""
    if all(isinstance(response, tuple) for response in responses):
        return [round(loss, 4) for loss, _ in responses]
    return str(responses[0]) if len(responses) == 1 else [str(response) for response in responses]


def number_of(value: Any) -> float | None:
    """A score that is a number, or holds one; else None."""
    if isinstance(value, bool | int | float):
        return float(value)
    if isinstance(value, dict) and isinstance(value.get("score"), int | float):
        return float(value["score"])
    return None


@contextmanager
def quiet_lmms_eval() -> Iterator[None]:
    """Silence lmms-eval's log, its progress bars and its calls of git while the context lasts."""
    replacements = {
        "tqdm": lambda original: lambda *args, **kwargs: original(*args, **{**kwargs, "disable": True}),
        "get_git_commit_hash": lambda original: lambda: None,
        "get_git_branch_name": lambda original: lambda: None,
    }
    logger.disable("lmms_eval")
    try:
        with ExitStack() as stack:
            for name in ("lmms_eval.evaluator", "lmms_eval.api.task"):
                module = importlib.import_module(name)
                for attribute, replace in replacements.items():
                    if hasattr(module, attribute):
                        stack.enter_context(mock.patch.object(module, attribute, replace(getattr(module, attribute))))
            yield
    finally:
        logger.enable("lmms_eval")
