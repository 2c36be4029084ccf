"""tiny-llava's training: the schedule that the shipped checkpoint was trained with.

The schedule is what was really run, watched and lengthened on the way: hence several stages of one kind. The tower learns
alone on labels of the patches while the language model learns alone on symbolic tokens; then come the projector and
everything together.
"""

from __future__ import annotations

from pathlib import Path

from ..common.dropping import Drop
from ..common.loop import Phase, Stage
from ..common.pipeline import Pipeline
from .batches import BUSY, CROWDED, DENSE, FULL, MIXED, TOY, BatchPlan, foreground_mask
from .workshop import LlavaWorkshop

TURNS = (("attribute", 2), ("existence", 2), ("counting", 1), ("relation", 2), ("reading", 1))
HARD_TURNS = (("attribute", 1), ("existence", 1), ("counting", 2), ("relation", 5), ("reading", 1))
SEES, READS = ("tower", "heads"), ("language", "symbolic")

TOWER = (
    Stage("tower", "tower", (Phase(1500, BatchPlan(32, CROWDED)),), (1e-3,), 1_000_000, floor=0.2),
    Stage(
        "tower_full", "tower", (Phase(300, BatchPlan(12, FULL)),), (5e-4,), 1_500_000,
        after=(("tower", *SEES),), warmup=30, floor=0.2,
    ),
    Stage(
        "tower_more", "tower", (Phase(350, BatchPlan(12, FULL)),), (7e-4,), 1_700_000,
        after=(("tower_full", *SEES),), warmup=30, floor=0.1,
    ),
    Stage(
        "tower_dense", "tower", (Phase(400, BatchPlan(12, DENSE)),), (8e-4,), 1_800_000,
        after=(("tower_more", *SEES),), warmup=20, floor=0.1,
    ),
    Stage(
        "tower_last", "tower", (Phase(130, BatchPlan(12, DENSE)),), (4e-4,), 1_900_000,
        after=(("tower_dense", *SEES),), warmup=10, floor=0.1,
    ),
)  # fmt: skip
"""Small pictures first, at the end pictures with twice as many things, so that each teaches more."""

LANGUAGE = (
    Stage(
        "language", "language", (Phase(700, BatchPlan(24, TOY, draw=False, turns=TURNS)),), (1.5e-3,), 2_000_000,
        settings={"nothing": False}, floor=0.5,
    ),
    Stage(
        "language_more", "language", (Phase(400, BatchPlan(24, TOY, draw=False, turns=TURNS)),), (1.5e-3,), 2_300_000,
        after=(("language", *READS),), warmup=20, floor=0.3,
    ),
    Stage(
        "language_hard", "language", (Phase(220, BatchPlan(20, TOY, draw=False, turns=HARD_TURNS)),), (1.2e-3,), 2_400_000,
        after=(("language_more", *READS),), settings={"embeddings": False}, warmup=20, floor=0.4,
    ),
    Stage(
        "language_full", "language", (Phase(160, BatchPlan(8, FULL, draw=False, turns=TURNS)),), (7e-4,), 2_500_000,
        after=(("language_hard", *READS),), settings={"embeddings": False}, warmup=30, floor=0.3,
    ),
)  # fmt: skip
"""From the second stage on words that name nothing learn to look in front of the picture, from the third on the embeddings
stay; the last has the whole grid."""

BRIDGE = Stage(
    "bridge", "bridge", (Phase(140, BatchPlan(12, DENSE)),), (2e-3, 4e-4), 3_000_000,
    after=(("tower_last", *SEES), ("language_more", *READS)), warmup=20,
)  # fmt: skip

JOINT = (
    Stage(
        "joint", "joint", (Phase(201, BatchPlan(12, BUSY, turns=TURNS)),), (6e-4, 4e-4), 4_000_000,
        after=(("bridge",), ("language_full", "language")), settings={"balance": {}}, warmup=30, horizon=600,
    ),
    Stage(
        "joint_more", "joint", (Phase(460, BatchPlan(12, BUSY, turns=TURNS)),), (5e-4, 4e-4), 5_000_000,
        after=(("joint",),), warmup=20, floor=0.02,
    ),
)  # fmt: skip

PLACES_TURNS = (("attribute", 1), ("existence", 2), ("counting", 3), ("relation", 6), ("reading", 1))
PRUNED_TURNS = (("attribute", 1), ("existence", 1), ("counting", 4), ("relation", 1), ("reading", 2))

PRUNED = (
    Stage(
        "pruned", "pruned",
        (Phase(228, BatchPlan(4, canvases=MIXED, rounds=3, turns=PLACES_TURNS, drop=Drop(0.05, 0.6, 0.25))),),
        (5e-4, 1e-3), 6_000_000,
        after=(("joint_more", "tower", "heads", "symbolic", "projector", "language"),), warmup=15, floor=0.3,
        horizon=500,
    ),
    Stage(
        "pruned_more", "pruned",
        (Phase(240, BatchPlan(4, canvases=MIXED, rounds=3, turns=PRUNED_TURNS, drop=Drop(0.15, 0.45, 0.5))),),
        (4e-4, 8e-4), 6_500_000, after=(("pruned",),), warmup=5, floor=0.02,
    ),
)  # fmt: skip
"""From here on background tokens are dropped; first with many questions about places, which it did not learn
in so few steps."""

PIPELINE = Pipeline(
    name="tiny-llava",
    model_class="LlavaForConditionalGeneration",
    chains=((TOWER, LANGUAGE), ((BRIDGE,),), ((*JOINT, *PRUNED),)),
    workshop=LlavaWorkshop,
    card=Path(__file__).with_name("card.md"),
    large=False,
    foreground=foreground_mask,
    further=("pruned", "pruned_more"),
)
