"""What a caller sets for the calls inside a `with vlmprune.options(...)` block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from vlmprune.errors import BudgetError, ParameterError
from vlmprune.methods.pipeline import Pipeline


@dataclass(frozen=True)
class RowPipelines:
    """The methods as they run in each row of a batch, which differ in nothing but `keep`.

    Attributes:
        pipelines: one for all rows, or one for each row of the caller's batch.
    """

    pipelines: tuple[Pipeline, ...]

    @property
    def by_row(self) -> bool:
        """Whether rows have budgets of their own."""
        return len(self.pipelines) > 1

    def row(self, row: int, rows: int) -> Pipeline:
        """Return the methods of one of `rows` rows, which may repeat the caller's for beams and return sequences.

        Raises:
            BudgetError: the number of rows is no multiple of the number of budgets.
        """
        times, rest = divmod(rows, len(self.pipelines))
        if rest or not times:
            raise BudgetError(
                f"keep has {len(self.pipelines)} entries for a batch of {rows} rows; allowed: one entry for each row."
            )
        return self.pipelines[row // times]


@dataclass(frozen=True, eq=False)
class CallOptions:
    """What is in force for the calls of one model.

    Attributes:
        pipelines: the methods with another `keep`; None for those of `apply`.
        visual_mask: where the visual tokens are in calls that bring no images; None where nobody said so.
    """

    pipelines: RowPipelines | None = None
    visual_mask: Tensor | None = None


def row_pipelines(pipeline: Pipeline, keep: Any) -> RowPipelines:
    """Return `pipeline` with another budget, or with one for each row where `keep` is a list or tuple.

    Raises:
        BudgetError: bad budget, or none at all.
        ParameterError: the budget cannot be set by `keep`, or not row by row.
    """
    if not isinstance(keep, (list, tuple)):
        return RowPipelines((pipeline.with_keep(keep),))
    if not keep:
        raise BudgetError(f"keep={keep!r} is empty; allowed: one entry for each row of the batch.")
    for method in pipeline.methods:
        if getattr(method, "faithful", False):
            raise ParameterError(
                f"keep={keep!r}: {method.name!r} with faithful=True has one budget for the whole batch; allowed: one keep, or "
                "faithful=False."
            )
    pipelines = tuple(pipeline.with_keep(entry) for entry in keep)
    if any(other.at_encoder != pipelines[0].at_encoder for other in pipelines):
        assert pipeline.at_encoder is not None
        raise ParameterError(
            f"keep={keep!r}: {pipeline.at_encoder.name!r} acts in the vision tower, which encodes the images of all rows with "
            "one budget; allowed: one keep for it."
        )
    return RowPipelines(pipelines)


class OptionsInForce:
    """The innermost options of the current thread, or of the current task where calls are asynchronous."""

    def __init__(self) -> None:
        self._current: ContextVar[CallOptions] = ContextVar("vlmprune options")
        # Compiled code can follow an attribute, but not a context variable.
        self._ever_changed = False

    @property
    def current(self) -> CallOptions:
        """What is in force here."""
        return self._current.get(_NOTHING_SET) if self._ever_changed else _NOTHING_SET

    @contextmanager
    def changed(self, **changes: Any) -> Iterator[None]:
        """Set `changes` on top of what is in force, until the block ends or raises."""
        self._ever_changed = True
        token = self._current.set(replace(self.current, **changes))
        try:
            yield
        finally:
            self._current.reset(token)

    def __deepcopy__(self, memo: dict[int, Any]) -> OptionsInForce:
        return OptionsInForce()

    def __reduce__(self) -> tuple[type[OptionsInForce], tuple[()]]:
        return OptionsInForce, ()


_NOTHING_SET = CallOptions()
