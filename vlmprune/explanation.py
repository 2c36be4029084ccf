"""What `explain` says of a model: what was found in it, what that serves, and what is missing for the rest."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .errors import UnsupportedFamilyError
from .methods.base import Method
from .methods.needs import TOWER_ATTENTION, Need, ordered
from .methods.registry import METHODS

if TYPE_CHECKING:
    from vlmprune.patches.families.family import Family


def explain_model(model: Any) -> str:
    """Return what was found in a model, a fact a line; of a model that cannot be served, which facts are missing."""
    from vlmprune.patches.families.registry import find_family

    try:
        family = find_family(model)
        family.check()
    except UnsupportedFamilyError as error:
        return f"{type(model).__name__} is not served.\n  {error}"
    lines = [("class", _class_line(family)), *_parts(family)]
    lines += [("sites", site) for site in _sites(family)]
    lines += [("missing", gap) for gap in _gaps(family)]
    width = max(len(name) for name, _ in lines)
    return "\n".join(f"{name:<{width}}  {text}" for name, text in lines)


def _class_line(family: Family) -> str:
    from vlmprune.patches.families.registry import named_families

    found = family.is_general and type(family) not in named_families()
    how = "by what was found in it, as no family names it" if found else f"as {family.name}"
    return f"{type(family.model).__name__}, served {how}"


def _parts(family: Family) -> list[tuple[str, str]]:
    multimodal, decoder = family.multimodal_model, family.language_model
    path = ".".join(part for part in (family.multimodal_path, family.language_path) if part)
    ids = ", ".join(f"{modality} {family.placeholder_id(modality)}" for modality in family.modalities)
    return [
        (
            "encoder",
            ", ".join(f"{type(multimodal).__name__}.get_{modality}_features" for modality in family.modalities),
        ),
        ("placeholders", ids),
        ("decoder", f"{path}: {type(decoder).__name__}, {family.decoder_layers} layers"),
        ("positions", "three axes (M-RoPE)" if family.mrope else "one axis"),
        ("tower", _tower(family)),
        ("signal", _signal(family)),
        ("layout", "one plain grid an image" if family.has_grid else "no plain grid an image"),
    ]


def _tower(family: Family) -> str:
    if family.is_general and not family.has_tower_attention:
        kind = getattr(getattr(family.config, "vision_config", None), "model_type", None)
        return f"not known in its parts (configured as {kind!r}): {family.reason(TOWER_ATTENTION)}"
    facts = family.tower_facts
    return f"{type(family.vision_tower).__name__}, {facts.layers} layers, {facts.heads} heads, {family.tower_kind}"


def _signal(family: Family) -> str:
    if not family.has_tower_attention:
        return "none of the tower"
    return "attention of the CLS token" if family.tower_facts.has_cls else "attention that patches receive"


def _unmet(method: type[Method], family: Family) -> Need | None:
    return next((need for need in ordered(method.needs) if not need.met_by(family)), None)


def _sites(family: Family) -> list[str]:
    served: dict[str, list[str]] = {}
    for name, method in METHODS.items():
        if _unmet(method, family) is None:
            served.setdefault(method.site, []).append(name)
    return [f"{site}: {', '.join(names)}" for site, names in served.items()]


def _gaps(family: Family) -> list[str]:
    """Return what is missing, a reason a line, and the methods that it rules out."""
    gaps: dict[str, tuple[list[str], list[str]]] = {}
    for name, method in METHODS.items():
        need = _unmet(method, family)
        if need is None:
            continue
        why = family.reason(need)
        sentences, names = gaps.setdefault(why or need.sentence, ([], []))
        names.append(name)
        if why and need.sentence not in sentences:
            sentences.append(need.sentence)
    return [
        f"{', '.join(sentences) + ': ' if sentences else ''}{why}; so not {', '.join(names)}"
        for why, (sentences, names) in gaps.items()
    ]
