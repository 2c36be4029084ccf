"""Applying a method to a model and taking it away again."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeVar

from .budget import Keep
from .errors import (
    AlreadyAppliedError,
    NotAppliedError,
    ParameterError,
    UnsupportedFamilyError,
    UnsupportedMethodError,
    unknown,
)
from .methods.base import Method
from .methods.needs import FamilyFacts, Need, ordered
from .methods.pipeline import Pipeline, make_pipeline
from .methods.registry import known_methods, make_method
from .record import RunRecord

if TYPE_CHECKING:
    from torch import Tensor

    from vlmprune.patches.engine import PruningEngine
    from vlmprune.patches.families.family import Family

ModelT = TypeVar("ModelT")

_ATTRIBUTE = "_vlmprune"
_POSITIONS = ("compact", "original")


def apply(
    model: ModelT,
    method: str | Method | type[Method] | Sequence[str | Method] = "divprune",
    keep: float | int | None = None,
    *,
    positions: str | None = None,
    **parameters: Any,
) -> ModelT:
    """Prune or merge the visual tokens of every later prefill of `model`, in place.

    Args:
        model: a transformers vision-language model of a supported family, or what wraps one: a PEFT, DDP, FSDP,
            DataParallel or `torch.compile`d model, one that accelerate has prepared, or a pipeline. Compiled code is made
            anew, as `torch.compile` does not notice that hooks come and go.
        method: a method's name, class or object, or a list of them that act at different sites (a pipeline).
        keep: share of visual tokens kept, a float in (0, 1], or the number kept per image, an int; 0.25 if not given.
        positions: "compact" renumbers the kept tokens, "original" leaves their positions; by default as the family needs it.
        parameters: the method's own parameters. A symbol of its paper that is spelt in another way here is answered with
            an error that says how.

    Returns:
        What was given.

    Raises:
        AlreadyAppliedError: the model carries a method already.
        UnsupportedFamilyError: there is no model of a supported family inside.
        UnsupportedMethodError: the method needs something that this model does not have.
        UnknownNameError: unknown method, parameter or `positions`.
        BudgetError: bad `keep`.
        ParameterError: bad parameter.
    """
    from vlmprune.patches.engine import PruningEngine
    from vlmprune.patches.families.registry import find_family

    chosen = _pipeline(method, keep, parameters)
    if positions is not None and positions not in _POSITIONS:
        raise unknown("positions", positions, _POSITIONS)
    family = find_family(model)
    current = family.model.__dict__.get(_ATTRIBUTE)
    if current is not None:
        raise AlreadyAppliedError(
            f"{type(family.model).__name__} already carries {current.pipeline!r}. "
            f"Call vlmprune.remove(model) before applying {chosen!r}."
        )
    for chosen_method in chosen.methods:
        _check_served(chosen_method, family)
    engine = PruningEngine(family, chosen, positions)
    engine.install()
    family.model.__dict__[_ATTRIBUTE] = engine
    return model


def remove(model: ModelT) -> ModelT:
    """Take the method away; the model is exactly what it was before `apply`.

    Raises:
        NotAppliedError: no method was applied.
    """
    engine = _engine(model)
    engine.hooks.remove()
    del engine.family.model.__dict__[_ATTRIBUTE]
    return model


@contextmanager
def pruned(
    model: ModelT,
    method: str | Method | type[Method] | Sequence[str | Method] = "divprune",
    keep: float | int | None = None,
    *,
    positions: str | None = None,
    **parameters: Any,
) -> Iterator[ModelT]:
    """Apply a method for the body of a `with` statement; undone even when the body raises. Arguments as for `apply`."""
    apply(model, method, keep, positions=positions, **parameters)
    try:
        yield model
    finally:
        remove(model)


@contextmanager
def options(
    model: ModelT,
    *,
    keep: Keep | Mapping[str, Keep] | Sequence[Keep | Mapping[str, Keep]] | None = None,
    visual_mask: Tensor | None = None,
) -> Iterator[ModelT]:
    """Change the budget, or say where the visual tokens are, for the calls in the body of a `with` statement.

    It holds for calls made in this thread (or in this task, where calls are asynchronous), so a server can choose a budget for
    each request without applying the method again; a thread that is started in the body does not inherit it. Blocks nest,
    and what an inner one does not set stays as it was. Undone even when the body raises. A decoding that begins in the body
    may go on after it: what a prefill dropped stays dropped.

    Args:
        model: a model that a method is applied to.
        keep: as for `apply`, or a list or tuple with one entry for each row of the batch (before the expansion for beams and
            return sequences). Where several methods are applied, a mapping from their names to the budgets.
        visual_mask: for calls that bring embeddings and no images: which tokens are visual, `[batch, tokens]`. Bool:
            every unbroken run of true is an image. Int: 0 is text, other numbers tell the images of a row apart. It also serves
            calls of `model.model.language_model`. Nothing is known of the tokens' geometry; methods that
            read the vision tower, a grid or tiles refuse such calls.
            Calls of another length than the mask that go on with a filled cache (decoding, say) bring no new visual tokens.

    Returns:
        The same model, as the target of `as`.

    Raises:
        NotAppliedError: no method was applied.
        BudgetError: bad `keep`, or one that the model's layers cannot reach.
        ParameterError: the method's budget is set by another parameter than `keep`, one `keep` is given for several
            methods, or rows get budgets of their own under a method with `faithful=True`.
        LayoutError: `visual_mask` is no bool or int tensor of two dimensions.
    """
    engine = _engine(model)
    changes: dict[str, Any] = {}
    if keep is not None:
        from vlmprune.patches.call_options import row_pipelines

        changes["pipelines"] = row_pipelines(engine.pipeline, keep)
        engine.prepare(changes["pipelines"])
    if visual_mask is not None:
        from vlmprune.patches.prefill.given_mask import checked_mask

        changes["visual_mask"] = checked_mask(visual_mask)
    with engine.options.changed(**changes):
        yield model


def last_run(model: Any) -> RunRecord:
    """Return the record of the latest prefill.

    Raises:
        NotAppliedError: no method is applied.
        NoRunError: no prefill has run since.
    """
    record: RunRecord = _engine(model).last_run()
    return record


def describe(model: Any) -> str:
    """Return what is applied to a model, as text for bug reports: versions, method, and the hooks in order.

    Raises:
        NotAppliedError: no method is applied.
    """
    from .description import describe_engine

    engine = _engine(model)
    return describe_engine(engine.family.model, engine)


def explain(model: Any) -> str:
    """Return what was found in a model: tower, signal, layout, the methods of each site, and what is missing for the others.

    No method need be applied. Of a model that cannot be served it says which of the needed facts its class lacks.
    """
    from .explanation import explain_model

    return explain_model(model)


def register_family(model_class: Any, family: Any = None, **facts: Any) -> Any:
    """Say how a class of your own, or of a repository with remote code, is built, so that methods can be applied to it.

    Args:
        model_class: the class of the whole model, `type(model)`.
        family: a family whose facts hold for it, one of vlmprune's or your own subclass; without it the facts below hold.
        facts: `multimodal_model`, from the model to the module whose `get_image_features` encodes images (its output has them
            in `pooler_output`) and whose forward calls the decoder, "model" by default and "" for the model itself;
            `language_model`, from that module to the decoder, "language_model" by default; `modalities`, of "image" and
            "video", ("image",) by default; `mrope`, whether position ids are 3-D, False by default.

    Returns:
        The family, whose objects know one model each.

    Raises:
        ParameterError: `model_class` is no class of modules, or `family` no family.
        UnknownNameError: another fact; names those that there are.
    """
    from vlmprune.patches.families import registry

    known = ("multimodal_model", "language_model", "modalities", "mrope")
    for name in facts:
        if name not in known:
            raise unknown("fact", name, known)
    return registry.register_family(model_class, family, **facts)


def list_methods(model: Any = None) -> list[str]:
    """Return the names of all methods, or of those that this model can be served with.

    Raises:
        UnsupportedFamilyError: there is no model of a supported family inside.
    """
    if model is None:
        return list(known_methods())
    from vlmprune.patches.families.registry import find_family

    family = find_family(model)
    return [name for name, cls in known_methods().items() if _unmet(cls, family) is None]


def _pipeline(method: Any, keep: object, parameters: dict[str, Any]) -> Pipeline:
    if not isinstance(method, (list, tuple)):
        return make_pipeline([make_method(method, keep, **parameters)])
    if len(method) > 1 and (keep is not None or parameters):
        given = ", ".join((["keep"] if keep is not None else []) + list(parameters))
        raise ParameterError(
            f"{given} given beside a list of methods; set it on each of them: [DivPrune(keep=0.5), PyramidDrop(keep=0.3)]."
        )
    return make_pipeline([make_method(item, keep, **parameters) for item in method])


def _unmet(method: Method | type[Method], family: FamilyFacts) -> Need | None:
    """Return the first need of a method that the model of `family` does not meet."""
    return next((need for need in ordered(method.needs) if not need.met_by(family)), None)


def _check_served(method: Method, family: Family) -> None:
    for part in method.parts():
        need = _unmet(part, family)
        if need is not None:
            where, why = ", ".join(_families_with(need)), family.reason(need)
            served = ", ".join(list_methods(family.model))
            raise UnsupportedMethodError(
                f"{part.name!r} needs {need.sentence}, which this {family.name} model does not have{why and f': {why}'}."
                f"{where and f' Families that have them: {where}.'} It can be served with: {served}."
            )


def _families_with(need: Need) -> Iterator[str]:
    """Yield the families whose every model meets a need, as far as that is a fact of the class."""
    from vlmprune.patches.families.registry import FAMILIES

    for cls in FAMILIES:
        # Facts that depend on the model are properties, which say nothing before there is one.
        with suppress(AttributeError, TypeError):
            if need.met_by(cls) is True:  # type: ignore[arg-type]
                yield cls.name


def _engine(model: Any) -> PruningEngine:
    from vlmprune.patches.families.wrappers import find_inside

    found = find_inside(model, lambda item: _ATTRIBUTE in getattr(item, "__dict__", {}))
    if found is None:
        raise NotAppliedError(
            f"No vlmprune method is applied to this {type(model).__name__}. Call vlmprune.apply(model, ...)."
        )
    engine: PruningEngine = found.__dict__[_ATTRIBUTE]
    return engine


__all__ = [
    "UnsupportedFamilyError",
    "apply",
    "describe",
    "explain",
    "last_run",
    "list_methods",
    "options",
    "pruned",
    "register_family",
    "remove",
]
