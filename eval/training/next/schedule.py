"""tiny-llava-next's training: the schedule that the shipped checkpoint was trained with, from tiny-llava's weights on."""

from __future__ import annotations

from pathlib import Path

from ..common.dropping import Drop
from ..common.loop import Phase, Stage
from ..common.pipeline import Pipeline
from ..llava.clip_workshop import BALANCE
from .batches import ALL_GRIDS, COARSE_GRIDS, SMALL_GRIDS, SQUARE, TEST_GRIDS, TilePlan, foreground_mask
from .workshop import NextWorkshop

TURNS = (("attribute", 2), ("existence", 2), ("counting", 2), ("relation", 3), ("reading", 1))
MANY_TURNS = (("attribute", 3), ("existence", 3), ("counting", 4), ("relation", 5), ("reading", 1))
READING_TURNS = (("attribute", 2), ("existence", 2), ("counting", 4), ("relation", 5), ("reading", 3))
SEES, READS = ("tower", "heads"), ("language", "symbolic", "stitcher", "insight")
BALANCED = {"balance": BALANCE}


def coarse(grids: tuple[tuple[int, int], ...]) -> TilePlan:
    """Labels of coarse tiles with questions."""
    return TilePlan(16, grids, cells=6, things=(3, 5), radius=(8.0, 11.0), draw=False, turns=TURNS)


PRUNED_TURNS = (("attribute", 1), ("existence", 2), ("counting", 3), ("relation", 3), ("reading", 4))

STAGES = (
    Stage(
        "tower", "tower", (Phase(330, TilePlan(6, SQUARE, things=(5, 9))),), (6e-4,), 11_000_000,
        settings=BALANCED, warmup=20, floor=0.15,
    ),
    Stage(
        "tower_more", "tower", (Phase(260, TilePlan(6, ALL_GRIDS, things=(5, 9))),), (5e-4,), 11_500_000,
        after=(("tower", *SEES),), settings=BALANCED, warmup=10, floor=0.1,
    ),
    Stage("language", "language", (Phase(300, coarse(SQUARE)),), (1e-3,), 12_000_000, warmup=20, floor=0.2),
    Stage(
        "language_more", "language", (Phase(130, coarse(COARSE_GRIDS)),), (8e-4,), 12_500_000,
        after=(("language", *READS),), settings={"symbols": False}, warmup=10, floor=0.2,
    ),
    Stage(
        "bridge", "bridge", (Phase(60, TilePlan(6, SQUARE)),), (1.5e-3, 3e-4), 13_000_000,
        after=(("tower_more", *SEES), ("language", *READS)), settings=BALANCED, warmup=10,
    ),
    Stage(
        "joint", "joint",
        (Phase(150, TilePlan(6, SMALL_GRIDS, turns=MANY_TURNS)), Phase(150, TilePlan(6, ALL_GRIDS, turns=MANY_TURNS))),
        (5e-4, 6e-4), 14_000_000,
        after=(("bridge",), ("language_more", "language", "insight")), warmup=15, floor=0.1,
    ),
    Stage(
        "joint_more", "joint", (Phase(141, TilePlan(6, TEST_GRIDS, turns=READING_TURNS)),), (4e-4, 5e-4), 15_000_000,
        after=(("joint",),), warmup=5, floor=0.02, horizon=200,
    ),
    Stage(
        "joint_last", "joint", (Phase(120, TilePlan(6, TEST_GRIDS, turns=READING_TURNS, broken=0.5)),),
        (3e-4, 4.5e-4), 16_000_000,
        after=(("joint_more",),), warmup=5, floor=0.02,
    ),
    Stage(
        "pruned", "pruned",
        (Phase(300, TilePlan(4, TEST_GRIDS, turns=PRUNED_TURNS, broken=0.4, rounds=3, drop=Drop(0.12, 0.5, 0.4))),),
        (4e-4, 8e-4), 17_000_000, after=(("joint_last", "tower", "heads", "projector", "stitcher", "language"),),
        warmup=10, floor=0.02,
    ),
)  # fmt: skip
"""Pictures that are not square come in the second tower stage, with a distorted first tile; then more reading, and at the end
more strings that run over the edge between two crops. In the last stage background tokens are dropped."""

PIPELINE = Pipeline(
    name="tiny-llava-next",
    model_class="LlavaNextForConditionalGeneration",
    chains=((STAGES,),),
    workshop=NextWorkshop,
    card=Path(__file__).with_name("card.md"),
    starts_from="tiny-llava",
    threads=1,
    foreground=foreground_mask,
    further=("pruned",),
)
