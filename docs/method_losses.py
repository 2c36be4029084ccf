"""When a method loses: what follows from what it reads, and where it was measured below a baseline."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

from vlmprune.methods.base import Method
from vlmprune.methods.needs import (
    FIRST_LAYER,
    INSTRUCTION,
    LAST_TOKEN_AT_CUT,
    LAST_TOKEN_BEFORE_CUT,
    PIXELS,
    TEXT_AT_CUT,
    TEXT_BEFORE_CUT,
    TOWER_ATTENTION,
)
from vlmprune.methods.registry import make_method

REQUIRED = {"cdpruner": {"relevance": "instruction"}, "recoverable_compression": {"relevance": "instruction"}}
"""What some methods cannot be made without."""
READS_THE_QUESTION = frozenset(
    (FIRST_LAYER, INSTRUCTION, LAST_TOKEN_AT_CUT, LAST_TOKEN_BEFORE_CUT, TEXT_AT_CUT, TEXT_BEFORE_CUT)
)
BASELINES = ("random", "uniform", "pool")
Rows = Mapping[str, Iterable[Mapping[str, str]]]
"""Lines of results by the name of the model."""


def when_it_loses(cls: type[Method], results: Rows) -> Iterator[str]:
    """Yield sentences."""
    if cls.site == "attention":
        yield "It drops nothing: it costs time and saves none."
        return
    yield from _by_what_it_reads(cls)
    if cls.name in BASELINES or cls.site == "encoder":
        return
    measured, below = False, []
    for model, lines in results.items():
        rows = {(row["method"], row["keep"]): 100 * float(row["relative"]) for row in lines}
        for (method, keep), of_full in rows.items():
            if method != cls.name or ("random", keep) not in rows:
                continue
            measured = True
            better = [f"`{name}` {rows[name, keep]:.0f}" for name in BASELINES if rows.get((name, keep), 0) > of_full]
            if better:
                below.append(f"{model} at {keep}: {of_full:.0f} % of full, {', '.join(better)}")
    if below:
        yield (
            f"Measured below a baseline: {'; '.join(below)}. Which differences are more than chance: "
            "[table](../measured.md#methods-compared)."
        )
    elif measured:
        yield "On the models measured here it is nowhere below `random`, `uniform` or `pool` at the same budget."


def _by_what_it_reads(cls: type[Method]) -> Iterator[str]:
    parts = make_method(cls.name, keep=0.5, **REQUIRED.get(cls.name, {})).parts()
    sites, needs = {part.site for part in parts}, frozenset().union(*(part.needs for part in parts))
    if "encoder" in sites:
        yield (
            "Small things that resemble what is around them are merged or dropped before the language model can see them; "
            "reading suffers first."
        )
    if sites == {"layer"}:
        yield (
            "All tokens pass the layers before its first cut, so it saves less than a method before the language model "
            "at the same quality, and nothing of the cache of those layers."
        )
    if needs & READS_THE_QUESTION:
        yield "It keeps what the first question asks for: a second one about the same cached picture finds what that left."
    elif PIXELS in needs:
        yield "It looks for flat areas: in a photograph few patches are like their neighbours, and at a given `keep` others go."
    elif TOWER_ATTENTION in needs and "input" in sites:
        yield (
            "It does not read the question: what the vision tower looks past (background, small things, fine print) goes "
            "first, also where the answer lies there."
        )
    elif sites == {"input"}:
        yield "It does not read the question, so at small budgets what is asked for is dropped like everything else."
