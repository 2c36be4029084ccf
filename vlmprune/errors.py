"""The exceptions vlmprune raises, each naming the value, what is allowed and the nearest match."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class VlmpruneError(Exception):
    """Base of every error that vlmprune raises on purpose."""


class UnknownNameError(VlmpruneError, ValueError):
    """A method, parameter, family, task or preset of that name does not exist."""


class BudgetError(VlmpruneError, ValueError):
    """`keep` is not a share in (0, 1] or a positive count, or a method cannot reach it."""


class ParameterError(VlmpruneError, ValueError):
    """A method's parameter has a value that the method cannot use."""


class AlreadyAppliedError(VlmpruneError, RuntimeError):
    """The model already carries a vlmprune method."""


class NotAppliedError(VlmpruneError, RuntimeError):
    """The model carries no vlmprune method."""


class NoRunError(VlmpruneError, RuntimeError):
    """No prefill has run since the method was applied."""


class UnsupportedFamilyError(VlmpruneError, TypeError):
    """The model's class belongs to no supported family."""


class UnsupportedMethodError(VlmpruneError, ValueError):
    """The method needs something that this model does not have, or two methods claim the same site."""


class UnsupportedCallError(VlmpruneError, ValueError):
    """The call uses a feature of the host library that cannot be combined with pruning."""


class LayoutError(VlmpruneError, RuntimeError):
    """Placeholders, image features and attention mask of a call do not fit together."""


class MissingExtraError(VlmpruneError, ImportError):
    """An optional dependency is not installed."""


class VlmpruneWarning(UserWarning):
    """A call that vlmprune leaves as it is, which may not be what was meant."""


def nearest(value: str, allowed: Iterable[str]) -> str | None:
    """Return the allowed name closest to `value`, or None where nothing is close."""
    matches = get_close_matches(str(value).lower(), list(allowed), n=1, cutoff=0.5)
    return matches[0] if matches else None


def unknown(kind: str, value: object, allowed: Iterable[str]) -> UnknownNameError:
    """Build the error for a name that is not among `allowed`, with the nearest match where there is one."""
    names = list(allowed)
    match = nearest(str(value), names)
    hint = f" Did you mean {match!r}?" if match else ""
    return UnknownNameError(f"Unknown {kind} {value!r}.{hint} Allowed: {', '.join(names) or 'none'}.")


def unknown_parameter(method: str, symbol: str, here: str, allowed: Iterable[str]) -> UnknownNameError:
    """Build the error for a symbol of a method's paper that is spelt in another way here."""
    return UnknownNameError(
        f"Unknown parameter of {method} {symbol!r}: what its paper or code calls {symbol} is {here} in this library. "
        f"Allowed: {', '.join(allowed)}."
    )


def missing_extra(extra: str, module: str) -> MissingExtraError:
    """Build the error for a module that belongs to an extra which is not installed."""
    return MissingExtraError(f"{module!r} is not installed. Install it with: pip install 'vlmprune[{extra}]'")
