"""tiny-qwen2.5-vl's training: the schedule that the shipped checkpoint was trained with.

The tower learns alone from nothing, on labels of patches and tokens and on the code of visual tokens read off the shipped
tiny-llava; the language model, which starts from tiny-llava's, learns alone on symbolic tokens; then everything learns together.
"""

from __future__ import annotations

from pathlib import Path

from ..common.dropping import Drop
from ..common.loop import Phase, Stage
from ..common.pipeline import Pipeline
from .batches import SizedPlan, foreground_mask
from .workshop import QwenWorkshop

SMALL = ((5, 5), (4, 6), (6, 4), (5, 6), (6, 6), (8, 4))
SIZES = ((12, 12), (12, 12), (10, 14), (14, 10), (9, 16), (12, 18), (8, 8), (18, 8))
RELATION_TURNS = (("attribute", 1), ("existence", 2), ("counting", 2), ("relation", 4), ("reading", 1))
TURNS = (("attribute", 1), ("existence", 2), ("counting", 2), ("relation", 3), ("reading", 1))
SEES, READS = ("tower", "heads"), ("language", "guides", "codes")
PLACES = {"guide": 1.5, "vectors": 5.0}
"""More weight on where things are."""

TOWER = (
    Stage(
        "tower", "tower", (Phase(450, SizedPlan(800, SMALL, things=(10, 14))),), (2e-3,), 1_000_000,
        warmup=30, floor=0.3, horizon=700,
    ),
    Stage(
        "tower_full", "tower", (Phase(150, SizedPlan(1200, SIZES, things=(8, 12))),), (1.2e-3,), 1_500_000,
        after=(("tower", *SEES),), warmup=20, floor=0.2,
    ),
)  # fmt: skip

LANGUAGE = (
    Stage(
        "language", "language", (Phase(282, SizedPlan(2000, SIZES, draw=False, turns=RELATION_TURNS)),),
        (1e-3,), 2_000_000, warmup=20, floor=0.1, horizon=600,
    ),
    Stage(
        "language_places", "language", (Phase(300, SizedPlan(1700, SIZES, draw=False, turns=RELATION_TURNS)),),
        (1.5e-3,), 2_300_000, after=(("language", *READS),), settings=PLACES, warmup=10, floor=0.2,
    ),
    Stage(
        "language_more", "language", (Phase(180, SizedPlan(1700, SIZES, draw=False, turns=RELATION_TURNS)),),
        (1.5e-3,), 2_400_000, after=(("language_places", *READS),), settings=PLACES, warmup=10, floor=0.1,
    ),
)  # fmt: skip

JOINT = Stage(
    "joint", "joint", (Phase(400, SizedPlan(1200, SIZES, turns=TURNS)),), (7e-4, 5e-4), 4_000_000,
    after=(("language_more", *READS), ("tower_full", *SEES)), warmup=20,
)  # fmt: skip

PRUNED_TURNS = (("attribute", 2), ("existence", 2), ("counting", 4), ("relation", 3), ("reading", 2))

PRUNED = Stage(
    "pruned", "pruned",
    (Phase(300, SizedPlan(700, SIZES, turns=PRUNED_TURNS, rounds=3, drop=Drop(0.15, 0.45, 0.6))),),
    (5e-4,), 6_000_000, after=(("joint", *SEES, "language"),), warmup=10, floor=0.02,
)  # fmt: skip
"""From here on background tokens are dropped."""

PIPELINE = Pipeline(
    name="tiny-qwen2.5-vl",
    model_class="Qwen2_5_VLForConditionalGeneration",
    chains=((TOWER, LANGUAGE), ((JOINT, PRUNED),)),
    workshop=QwenWorkshop,
    card=Path(__file__).with_name("card.md"),
    foreground=foreground_mask,
    further=("pruned",),
)
