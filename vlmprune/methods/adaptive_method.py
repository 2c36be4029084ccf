"""The base of the input methods that find by themselves how many tokens an image needs."""

from __future__ import annotations

from dataclasses import dataclass, replace

from ..budget import Keep, check_keep, token_budget
from .input_method import InputMethod


@dataclass(frozen=True, kw_only=True)
class AdaptiveMethod(InputMethod):
    """An input method whose budget depends on the image unless one is given.

    Attributes:
        keep: None for the method's own count, which `last_run` records; else as for other methods, and met exactly.
    """

    keep: Keep | None = None  # type: ignore[assignment]

    def __post_init__(self) -> None:
        if self.keep is not None:
            object.__setattr__(self, "keep", check_keep(self.keep))

    def with_budgets(self) -> AdaptiveMethod:
        """Return the method with a budget."""
        return self if self.keep is not None else replace(self, keep=1.0)

    def budget(self, total: int) -> int:
        """Return how many tokens stay at most: one less than all where the image decides, so that it is asked."""
        return max(1, total - 1) if self.keep is None else token_budget(self.keep, total)

    def kept_count(self, total: int, grid: tuple[int, int] | None = None) -> int | None:
        """Return the budget; None where the image decides."""
        return None if self.keep is None else self.budget(total)
