"""Items of lmms-eval tasks as prompts with scores, for a search that asks them one by one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lmms_eval.api.instance import Instance

from vlmprune.errors import UnsupportedCallError
from vlmprune.eval.accuracy.generation import MAX_NEW_TOKENS, cut_at
from vlmprune.eval.accuracy.task_index import documents_of
from vlmprune.eval.accuracy.task_scores import TaskResultError, number_of


@dataclass(frozen=True, eq=False)
class TaskItem:
    """One item of a task that asks for generated text. It is read when it is asked for, pictures included."""

    name: str
    task: Any
    number: int

    @property
    def document(self) -> Any:
        """The task's own record of the item."""
        return documents_of(self.task)[self.number]

    @property
    def text(self) -> str:
        """The question."""
        return str(self.task.doc_to_text(self.document))

    @property
    def images(self) -> Sequence[Any]:
        """Pictures or clips."""
        found: Sequence[Any] = self.task.doc_to_visual(self.document) or []
        return found

    @property
    def new_tokens(self) -> int:
        """How long the task lets an answer be."""
        settings = self.task.config.generation_kwargs or {}
        return int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or MAX_NEW_TOKENS)

    def score(self, answer: str) -> float:
        """What the task's own scoring gives for `answer`, its filters before it; negated where less is better.

        Raises:
            TaskResultError: the task scores no single item by a number.
        """
        document, task = self.document, self.task
        answer = cut_at(answer, (task.config.generation_kwargs or {}).get("until"))
        request = Instance("generate_until", (), 0, {"task": self.name, "doc_id": self.number, "repeats": 1}, [answer])
        ensemble = task._filters[0]
        ensemble.apply([request], [document])
        found: Mapping[str, Any] = task.process_results(document, [request.filtered_resps[ensemble.name]])
        named = [each["metric"] for each in task.config.metric_list or [] if isinstance(each.get("metric"), str)]
        for metric in [*named, *found]:
            value = number_of(found.get(metric))
            if value is not None:
                return value if task.higher_is_better().get(metric, True) else -value
        raise TaskResultError(f"Task {self.name!r} scores no single item by a number; it gave {sorted(found)}.")


def task_items(tasks: Mapping[str, Any], limit: int | None = None) -> list[TaskItem]:
    """The items of all tasks; `limit` is a number of items a task.

    Raises:
        UnsupportedCallError: a task asks for something else than generated text.
    """
    found = []
    for name, task in tasks.items():
        if task.OUTPUT_TYPE != "generate_until":
            raise UnsupportedCallError(
                f"Task {name!r} is of type {task.OUTPUT_TYPE!r}; allowed here: generate_until. `vlmprune bench` runs the others."
            )
        count = len(documents_of(task))
        found += [TaskItem(name, task, number) for number in range(count if limit is None else min(limit, count))]
    return found
