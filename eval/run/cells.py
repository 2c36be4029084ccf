"""The cells of a benchmark: the unpruned model, and every method at every budget."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Literal

from transformers import PreTrainedModel

import vlmprune
from vlmprune.budget import Keep, check_keep
from vlmprune.errors import BudgetError, ParameterError, UnsupportedMethodError, VlmpruneError, unknown
from vlmprune.eval.models.lower_resolution import LOWER_RESOLUTION, LowerResolution, taking_smaller_pictures
from vlmprune.methods.adaptive_method import AdaptiveMethod
from vlmprune.methods.base import Method
from vlmprune.methods.pipeline import check_call
from vlmprune.methods.registry import get_method, make_method, method_names
from vlmprune.patches.families.registry import find_family

FULL = "full"
ALL = "all"
RANDOM = "random"
BASELINES = (RANDOM, "uniform", "pool")
"""Honest cheap baselines that every table shows."""
COMPARED = (*BASELINES, LOWER_RESOLUTION)
"""What methods are compared with where it is in the table."""
SeedFrom = Literal["benchmark", "name", "repetition"]
Modality = Literal["image", "video"]


@dataclass(frozen=True)
class Cell:
    """One row of the table: a method with parameters at a budget, or the unpruned model.

    The unpruned model given smaller pictures is one too ("lower_resolution"). `keep` is None for the unpruned model and where
    the parameters themselves fix the budget. `seed_from` says where a method's seed comes from: the benchmark's own, asked for
    by name, or a repetition of the first with another one.
    `resources` are parameters too, but belong to the model and not to the row's name: a text tower, the tokenizer.
    """

    method: str = FULL
    keep: Keep | None = None
    parameters: tuple[tuple[str, Any], ...] = ()
    seed_from: SeedFrom = "benchmark"
    resources: tuple[tuple[str, Any], ...] = field(default=(), repr=False, compare=False)

    @property
    def is_full(self) -> bool:
        """Whether this is the unpruned model."""
        return self.method == FULL

    @property
    def is_pruned(self) -> bool:
        """Whether a method is applied to the model."""
        return self.method not in (FULL, LOWER_RESOLUTION)

    @property
    def title(self) -> str:
        """The method with those of its parameters that were asked for, as `parse_methods` reads it."""
        hidden = {"seed"} if self.seed_from == "benchmark" else set()
        shown = [f"{name}={_text(value)}" for name, value in self.parameters if name not in hidden]
        return ":".join([self.method, *shown])

    @property
    def repeats(self) -> str | None:
        """Label of the cell that this one repeats with another seed."""
        return replace(self, seed_from="benchmark").label if self.seed_from == "repetition" else None

    @property
    def label(self) -> str:
        """Title and budget."""
        return self.title if self.keep is None else f"{self.title} keep={self.keep}"

    @property
    def slug(self) -> str:
        """A file name that no other cell has."""
        name = self.label.replace(" ", "-")
        plain = re.sub(r"[^A-Za-z0-9._=-]+", "-", name)
        return plain if plain == name else f"{plain}-{hashlib.sha256(self.label.encode()).hexdigest()[:6]}"

    @property
    def arguments(self) -> dict[str, Any]:
        """All that the method is made with besides its budget."""
        return {**dict(self.resources), **dict(self.parameters)}

    @classmethod
    def from_stored(cls, result: Mapping[str, Any]) -> Cell:
        """The cell of a stored result."""
        parameters = {
            key: tuple(value) if isinstance(value, list) else value for key, value in result["parameters"].items()
        }
        source: SeedFrom = "repetition" if result.get("repeats") else "benchmark"
        cell = cls(result["method"], result["keep"], tuple(sorted(parameters.items())), source)
        return cell if cell.title == result["title"] else replace(cell, seed_from="name")

    def make_method(self) -> Method | None:
        """The method as an object; None for the unpruned model."""
        return make_method(self.method, self.keep, **self.arguments) if self.is_pruned else None

    def resolution(self, model: PreTrainedModel, processor: Any) -> LowerResolution | None:
        """What makes the pictures of this cell smaller, None where they stay as they are."""
        if self.method != LOWER_RESOLUTION or self.keep is None:
            return None
        return LowerResolution(model, processor, self.keep)

    def applied_to(self, model: PreTrainedModel) -> AbstractContextManager[Any]:
        """A context in which `model` is pruned as this cell says, or takes the smaller pictures of `resolution`."""
        if self.method == LOWER_RESOLUTION:
            return taking_smaller_pictures(model)
        if self.is_full:
            return nullcontext(model)
        return vlmprune.pruned(model, self.method, keep=self.keep, **self.arguments)


@dataclass(frozen=True)
class LeftOut:
    """A row that was asked for and that this model cannot give.

    `kind` is "not reachable" (the method cannot keep so few tokens) or "not served" (the method needs what the model does
    not have, layers included); `reason` names what is allowed.
    """

    title: str
    keep: Keep | None
    kind: Literal["not reachable", "not served"]
    reason: str

    @property
    def note(self) -> str:
        """One line for people."""
        keep = "" if self.keep is None or self.kind == "not served" else f" keep={self.keep}"
        return f"{self.title}{keep}: {self.kind}. {self.reason}"

    def described(self) -> dict[str, Any]:
        """All of it for a result file."""
        return {**asdict(self), "note": self.note}


def _text(value: Any) -> str:
    return "+".join(map(str, value)) + "+" * (len(value) == 1) if isinstance(value, tuple) else str(value)


def parse_methods(text: str, smaller_pictures: bool = False) -> list[tuple[str, dict[str, Any]]]:
    """Names with parameters from `"pool,fastervlm:layer=-2"`: methods by comma, parameters by colon; "all" is every method.

    "lower_resolution", the unpruned model given smaller pictures, is no method: it is allowed where `smaller_pictures` says so,
    and only run where it is named.

    Raises:
        UnknownNameError: a method or parameter does not exist.
        ParameterError: a value does not fit.
    """
    methods: list[tuple[str, dict[str, Any]]] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        if item == ALL:
            methods.extend((name, {}) for name in method_names())
            continue
        name, *pairs = item.split(":")
        if name == LOWER_RESOLUTION:
            if pairs or not smaller_pictures:
                raise ParameterError(
                    f"{item!r}: {LOWER_RESOLUTION!r} takes a keep and no other parameters, and is run by `vlmprune bench` and "
                    "lmms-eval; elsewhere choose the size of the picture (--image-size)."
                )
            methods.append((name, {}))
            continue
        cls = get_method(name)
        parameters: dict[str, Any] = {}
        for pair in pairs:
            key, equals, value = pair.partition("=")
            if not equals:
                raise ParameterError(f"{pair!r} in {item!r} is no parameter; write {name}:name=value.")
            if key not in (allowed := [field.name for field in fields(cls) if field.name != "keep"]):
                raise unknown(f"parameter of {name}", key, allowed)
            parameters[key] = parse_value(value)
        make_method(name, **parameters)
        methods.append((name, parameters))
    if not methods:
        raise ParameterError(f"--methods {text!r} names no method.")
    return methods


def parse_value(text: str) -> Any:
    """`text` as an int, float, bool, None, or tuple of these ("8+16+24", of one part "8+"), else as it is."""
    named = {"true": True, "false": False, "none": None}
    if text.lower() in named:
        return named[text.lower()]
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return tuple(parse_value(part) for part in text.split("+") if part) if "+" in text else text


def parse_keeps(text: str) -> list[Keep]:
    """Budgets from `"0.5,0.25,64"`: numbers with a point are shares, whole numbers are counts."""
    keeps: list[Keep] = []
    for item in filter(None, (part.strip() for part in text.split(","))):
        try:
            keep = check_keep(float(item) if re.search(r"[.eE]|nan|inf", item) else int(item))
        except ValueError as error:
            if isinstance(error, BudgetError):
                raise
            raise BudgetError(f"keep={item!r} is no number; allowed: shares like 0.25 or counts like 64.") from None
        if repr(keep) not in map(repr, keeps):
            keeps.append(keep)
    if not keeps:
        raise BudgetError(f"--keep {text!r} names no budget.")
    return keeps


def make_cells(
    methods: Iterable[tuple[str, dict[str, Any]]],
    keeps: Iterable[Keep],
    seed: int,
    baselines: Iterable[str] = (),
    random_seeds: int = 1,
) -> list[Cell]:
    """The unpruned cell, then `baselines` not named among the methods and every method, each at every budget.

    `seed` goes to the methods that take one and were given none; `random` is repeated with as many seeds as `random_seeds`.
    """
    wanted = list(methods)
    named = {name for name, _ in wanted}
    wanted = [(name, {}) for name in baselines if name not in named] + wanted
    budgets = list(keeps)
    cells = [Cell()]
    for name, parameters in wanted:
        if name == LOWER_RESOLUTION:
            cells.extend(Cell(name, keep) for keep in budgets)
            continue
        takes_seed = any(field.name == "seed" for field in fields(get_method(name)))
        given = {**({"seed": seed} if takes_seed else {}), **parameters}
        # A method whose own parameters fix the budget (stage ratios, say) has one cell; one that can find its own has one more.
        method = make_method(name, **given)
        own: list[Keep | None] = [None] if method.keep is None else []
        takes_keep = method.keep is not None or isinstance(method, AdaptiveMethod) or not parameters
        given_keeps = budgets if takes_keep and method.site != "attention" else []
        for number in range(random_seeds if name == RANDOM and "seed" not in parameters else 1):
            source: SeedFrom = "name" if "seed" in parameters else "repetition" if number else "benchmark"
            seeded = {**given, "seed": given["seed"] + number} if number else given
            cells.extend(Cell(name, keep, tuple(sorted(seeded.items())), source) for keep in [*own, *given_keeps])
    return list({cell.label: cell for cell in cells}.values())


def one_cell(method: str | None, keep: str | None) -> Cell:
    """The one cell of a method with parameters ("fastervlm:layer=-2") at one budget; no method is the unpruned model.

    Raises:
        UnknownNameError: a method or parameter does not exist.
        ParameterError: a value does not fit, or several methods are named.
        BudgetError: bad `keep`, or several.
    """
    if method is None:
        return Cell()
    methods, keeps = parse_methods(method), parse_keeps(keep) if keep is not None else [None]
    if len(methods) > 1:
        raise ParameterError(f"--method {method!r} names {len(methods)} methods; allowed: one.")
    if len(keeps) > 1:
        raise BudgetError(f"--keep {keep!r} names {len(keeps)} budgets; allowed: one.")
    name, parameters = methods[0]
    cell = Cell(name, keeps[0], tuple(sorted(parameters.items())), "name")
    cell.make_method()
    return cell


def names_all(methods: Iterable[tuple[str, dict[str, Any]]]) -> bool:
    """Whether every method there is was asked for, so that one which cannot serve the model is no mistake."""
    return {name for name, _ in methods} >= set(method_names())


def usable_cells(
    model: PreTrainedModel,
    cells: Iterable[Cell],
    methods: Sequence[tuple[str, dict[str, Any]]],
    *modalities: Modality,
) -> tuple[list[Cell], list[LeftOut]]:
    """Put every cell's method on and off once; returns the cells that the model can give, and those that it cannot.

    A cell must serve calls of each of `modalities` (pictures, if none is given). Budgets out of reach are left out, and so are
    methods that cannot serve the model, or such calls, where all methods were asked for.

    Raises:
        UnsupportedMethodError: a method asked for by name cannot serve the model, or such calls.
        ParameterError: its parameters do not fit the model.
        VlmpruneError: nothing of `methods` is left; the first error.
    """
    usable: list[Cell] = []
    left_out: dict[tuple[str, str], LeftOut] = {}
    errors: list[VlmpruneError] = []
    for cell in cells:
        try:
            with cell.applied_to(model):
                for modality in modalities or ("image",):
                    _check_modality(model, cell, modality)
                usable.append(cell)
        except BudgetError as error:
            errors.append(error)
            left_out[cell.label, ""] = not_reachable(cell, error)
        except (UnsupportedMethodError, ParameterError) as error:
            if not names_all(methods):
                raise
            errors.append(error)
            left_out[cell.title, "not served"] = LeftOut(cell.title, None, "not served", str(error))
    asked = {name for name, _ in methods}
    if errors and not any(cell.method in asked for cell in usable):
        raise errors[0]
    return usable, list(left_out.values())


def _check_modality(model: PreTrainedModel, cell: Cell, modality: Modality) -> None:
    if cell.method == LOWER_RESOLUTION and modality == "video":
        raise UnsupportedMethodError(
            f"{LOWER_RESOLUTION!r} makes pictures smaller, not videos, and a task shows videos."
        )
    method, family = cell.make_method(), find_family(model) if cell.is_pruned else None
    if method is not None and family is not None:
        for part in method.parts():
            check_call(part, (modality,), family)


def not_reachable(cell: Cell, error: BudgetError) -> LeftOut:
    """What to note of a cell whose budget the method cannot reach."""
    return LeftOut(cell.title, cell.keep, "not reachable", str(error))
