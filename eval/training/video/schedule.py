"""tiny-qwen2.5-vl-video's training: it goes on from the shipped tiny-qwen2.5-vl.

The language model learns about time on symbolic tokens first, then everything learns together on clips and some pictures.
"""

from __future__ import annotations

from pathlib import Path

from ..common.loop import Phase, Stage
from ..common.pipeline import Pipeline
from ..qwen.batches import SizedPlan
from ..qwen.schedule import SIZES, TURNS
from .batches import ClipPlan
from .card import finish
from .workshop import VideoWorkshop

MOVING = ("motion", "motion", "arrivals")
PICTURES = SizedPlan(900, SIZES, turns=TURNS)

LANGUAGE = (
    Stage(
        "language", "language", (Phase(265, ClipPlan(2400, draw=False)),), (1.5e-3,), 5_000_000,
        warmup=20, floor=0.1, horizon=900,
    ),
    Stage(
        "language_looking", "language", (Phase(179, ClipPlan(2400, draw=False)),), (1.5e-3,), 5_300_000,
        after=(("language",),), settings={"look": 0.5}, warmup=10, floor=0.1, horizon=700,
    ),
    Stage(
        "language_moving", "language", (Phase(400, ClipPlan(2400, MOVING, draw=False)),), (1.5e-3,), 5_600_000,
        after=(("language_looking", "language"),), settings={"look": 0.2}, warmup=10, floor=0.1,
    ),
)  # fmt: skip
JOINT = Stage(
    "joint", "joint", (Phase(179, ClipPlan(1500, pictures=5, picture_plan=PICTURES)),), (5e-4, 5e-4), 6_000_000,
    after=(("language_moving", "language", "guides"),), warmup=12, horizon=320,
)  # fmt: skip

JOINT_LAST = Stage(
    "joint_last", "joint", (Phase(50, ClipPlan(1500)),), (2.5e-4, 2.5e-4), 6_500_000, after=(("joint",),), warmup=3,
)  # fmt: skip

PIPELINE = Pipeline(
    name="tiny-qwen2.5-vl-video",
    model_class="Qwen2_5_VLForConditionalGeneration",
    chains=((LANGUAGE,), ((JOINT, JOINT_LAST),)),
    workshop=VideoWorkshop,
    card=Path(__file__).with_name("card.md"),
    finish=finish,
)
