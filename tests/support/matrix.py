"""The (method x family) matrix that drives the contract tests, made from the registry of methods."""

from __future__ import annotations

import pytest
import torch

from support.deeper import deeper
from support.deeper_tower import deeper_tower, one_tile
from support.families import (
    gemma4,
    glm4v,
    idefics3,
    internvl,
    llava_next,
    paddleocr_vl,
    pixtral,
    qwen3_5,
    qwen3_vl,
)
from support.family_cases import FAMILY_CASES
from support.tiny_models import LLAVA_CLIP_GQA, FamilyCase
from vlmprune.methods.needs import FIRST_LAYER, GRID, INSTRUCTION, PIXELS, VIDEOS, LayerNeed
from vlmprune.methods.registry import known_methods, make_method
from vlmprune.patches.families.registry import find_family

# Parameters without which a method is refused.
REQUIRED: dict[str, dict[str, object]] = {
    "cdpruner": {"relevance": "instruction"},
    "recoverable_compression": {"relevance": "instruction"},
}

# Parameters that make a method work harder on the tiny models than its defaults do.
HARDER: dict[str, dict[str, object]] = {
    "random": {"seed": 3},
    "todre": {"tau": 1.0, "layer": 3},
    "hiprune": {"alpha": 0.5},
    "holov": {"beta": 1.0},
    "visionzip": {"merge_at": "projected", "cls_token": False},
    "visiondrop": {"merge_at": "projected", "cls_token": False},
    "fastv": {"layer": 1},
    # Of random features hardly any are alike.
    "flashvid": {"temporal_threshold": 0.2, "segment_threshold": 0.2, "min_segments": 2},
    "holitom": {"tau": 0.2, "inner_layer": 2},
    "fastvid": {"scenes": 2, "tau": 0.3, "ignore": 0.6},
    "sink": {"layer": 1},
    "tome": {"output": "merged"},
    "expedite": {"output": "merged"},
    "pitome": {"output": "merged"},
    "crossget": {"output": "merged"},
    "mctf": {"output": "merged"},
    "zero_tprune": {"output": "merged"},
    "token_transforming": {"output": "merged"},
}
METHOD_PARAMETERS: dict[str, dict[str, object]] = {
    name: {**REQUIRED.get(name, {}), **HARDER.get(name, {})}
    for name, cls in known_methods().items()
    # They take no `keep`: tests/contracts/test_attention_methods.py.
    if cls.site != "attention"
}

_PARTS = {name: make_method(name, **parameters).parts() for name, parameters in METHOD_PARAMETERS.items()}

# They drop tokens between layers, so they get the deeper variant of every family.
LAYER_METHODS = frozenset(name for name, parts in _PARTS.items() if any(part.site == "layer" for part in parts))

# They reduce tokens between the blocks of the vision tower, so they get the variant with more of them.
ENCODER_METHODS = frozenset(name for name, parts in _PARTS.items() if any(part.site == "encoder" for part in parts))

# What enters the language model is already merged, or comes of a tower that ran on fewer tokens.
MERGE_BEFORE = frozenset(
    name
    for name, parts in _PARTS.items()
    if any((part.merges and part.site != "layer") or PIXELS in part.needs for part in parts)
)

# They score by the last prompt token or other text, inside the language model.
BY_THE_LAST_TOKEN = frozenset(
    name
    for name, parts in _PARTS.items()
    for part in parts
    if any(isinstance(need, LayerNeed) and need.rows != "all tokens" for need in part.needs)
)

# They score by what all tokens of a row do; those of earlier turns are no longer there to be seen, so images behind are refused.
BY_ALL_TOKENS_OF_A_CALL = frozenset({"transprune", "aim", "sink"})

# They score by the prompt's words: the same image is cut otherwise once more text follows it.
FOLLOW_THE_QUESTION = (
    BY_THE_LAST_TOKEN
    | BY_ALL_TOKENS_OF_A_CALL
    | {name for name, parts in _PARTS.items() for part in parts if {INSTRUCTION, FIRST_LAYER} & part.needs}
)


def few_tokens(method: str, family: FamilyCase) -> int:
    """Return a small number of tokens per image that the method can reach on average over the layers of the tiny model."""
    return 5 if method not in BY_THE_LAST_TOKEN else max(map(family.tokens, ("A", "large"))) // 3


# Every family meets these, which differ in what they read and where they drop or merge; the other methods meet one family of
# each kind. The rest of the product has the marker `whole`, which `make test-whole` runs too.
ON_EVERY_FAMILY = frozenset({"uniform", "pool", "fastervlm", "visionzip", "todre", "fastv", "pyramiddrop"})
# Families that differ from one before them in their tower or their decoder's layers meet these.
ON_FEWER = frozenset({"fastervlm"})
LIKE_ANOTHER = (
    *qwen3_5.CASES[1:],
    *internvl.CASES,
    *idefics3.CASES,
    *glm4v.CASES,
    *pixtral.CASES,
    *paddleocr_vl.CASES,
    *gemma4.CASES[1:],
)
# Those whose towers are read as a neighbour's meet none by default.
TWINS = (idefics3.IDEFICS3, glm4v.GLM46V, pixtral.LLAVA_PIXTRAL)
ONE_OF_EACH_KIND = (LLAVA_CLIP_GQA, llava_next.CASES[0], qwen3_vl.CASES[0])


# Patches of a side of the tile that stands in for one of so many patches.
SIDES = {36: 7}


def fitting(method: str, family: FamilyCase) -> FamilyCase:
    """Return the family with as many layers or blocks as the method needs."""
    if method == "expedite":
        # Its clusters are rows times columns: of 49 patches 15 are, of 36 none of 11.
        return one_tile(deeper_tower(family), SIDES.get(family.tokens("A"), 5))
    if method in ENCODER_METHODS:
        return deeper(deeper_tower(family)) if method in LAYER_METHODS else deeper_tower(family)
    return deeper(family) if method in LAYER_METHODS else family


def stateful(family: FamilyCase) -> bool:
    """Whether the host keeps states that cannot be rolled back, and refuses what would do it."""
    return bool(family.build(torch.float32)._is_stateful)


def croppable(family: FamilyCase) -> bool:
    """Whether caches give back what they hold: neither states nor full windows do."""
    kinds = getattr(family.build(torch.float32).config.get_text_config(), "layer_types", None) or ()
    return not stateful(family) and "sliding_attention" not in kinds


def makes_masks(family: FamilyCase) -> bool:
    """Whether the host makes masks by kinds of layers before it calls the language model."""
    return "create_masks_for_generate" in vars(type(family.build(torch.float32)))


def serves(name: str, family: FamilyCase) -> bool:
    """Whether the model of a family has all that a method needs."""
    facts = find_family(family.build(torch.float32))
    cls = known_methods()[name]
    parts = _PARTS.get(name) or make_method(name).parts()
    return all(need.met_by(facts) for part in (cls, *parts) for need in part.needs)


def _cases() -> list[object]:
    cases = []
    for family in FAMILY_CASES:
        facts = find_family(family.build(torch.float32))
        for name in METHOD_PARAMETERS:
            # Methods for videos: support/video_matrix.py.
            if any(VIDEOS in part.needs for part in _PARTS[name]):
                continue
            # There the grid is that of frames.
            if not facts.has_grid and any(GRID in part.needs for part in _PARTS[name]):
                continue
            if serves(name, family):
                case = fitting(name, family)
                everywhere = ON_FEWER if family in LIKE_ANOTHER else ON_EVERY_FAMILY
                everywhere = frozenset() if family in TWINS else everywhere
                marks = () if name in everywhere or family in ONE_OF_EACH_KIND else (pytest.mark.whole,)
                cases.append(pytest.param(name, case, id=f"{name}-{family}", marks=marks))
    return cases


MATRIX = _cases()
over_matrix = pytest.mark.parametrize(("method", "family"), MATRIX)

# For what depends on where tokens are dropped, not on which: in the tower, before the first layer, merged there, at both sites,
# in layers.
ONE_OF_EACH_SITE = ("tome", "divprune", "pool", "todre", "pyramiddrop")
over_sites = pytest.mark.parametrize(
    ("method", "family"), [case for case in MATRIX if case.values[0] in ONE_OF_EACH_SITE]
)
