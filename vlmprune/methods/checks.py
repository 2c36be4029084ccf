"""Checks of parameters; each names the value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence

from vlmprune.errors import ParameterError, unknown


def check_number(name: str, value: object, allowed: str, meaning: str = "") -> None:
    """Check that `value` is a number inside an interval.

    Args:
        name: the parameter.
        value: what was given.
        allowed: the interval, as "[0, 1)" or "(0, inf)".
        meaning: what the number says, for the message.

    Raises:
        ParameterError: no number, NaN, or outside.
    """
    low, high = (float(bound) for bound in allowed[1:-1].split(","))
    inside = False
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        above = value >= low if allowed[0] == "[" else value > low
        inside = above and (value <= high if allowed[-1] == "]" else value < high)
    if not inside:
        raise ParameterError(f"{name}={value!r}; allowed: a number in {allowed}{meaning and f', {meaning}'}.")


def check_int(name: str, value: object, low: int | None = None) -> None:
    """Raise ParameterError unless `value` is an int, and at least `low` where that is given."""
    if isinstance(value, bool) or not isinstance(value, int) or (low is not None and value < low):
        raise ParameterError(f"{name}={value!r}; allowed: an int{'' if low is None else f' >= {low}'}.")


def check_flag(name: str, value: object) -> None:
    """Raise ParameterError unless `value` is True or False."""
    if not isinstance(value, bool):
        raise ParameterError(f"{name}={value!r}; allowed: True or False.")


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Raise UnknownNameError unless `value` is one of `allowed`."""
    if value not in allowed:
        raise unknown(name, value, allowed)
