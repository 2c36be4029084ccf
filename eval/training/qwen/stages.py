"""The stages of the training, with the schedule that the shipped checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.loop import Metrics, Parts, Phase, Stage, Step, run_stage
from ..llava.stages import by_task
from .batches import SizedBatch, SizedPlan, stream
from .codes import Codes, blur, fit_codes
from .guides import Guides
from .language import answer
from .model import build_model
from .optimizer import MuonAdamW
from .tokenizer import VisionPrompts, build_tokenizer
from .tower import TowerHeads, look, total

SMALL = ((5, 5), (4, 6), (6, 4), (5, 6), (6, 6), (8, 4))
SIZES = ((12, 12), (12, 12), (10, 14), (14, 10), (9, 16), (12, 18), (8, 8), (18, 8))

TOWER = Stage(
    "tower",
    (Phase(450, SizedPlan(800, SMALL, things=(10, 14))),),
    rates=(2e-3,),
    seed=1_000_000,
    warmup=30,
    floor=0.3,
    horizon=700,
)

TOWER_FULL = Stage(
    "tower_full",
    (Phase(150, SizedPlan(1200, SIZES, things=(8, 12))),),
    rates=(1.2e-3,),
    seed=1_500_000,
    warmup=20,
    floor=0.2,
)
RELATION_TURNS = (("attribute", 1), ("existence", 2), ("counting", 2), ("relation", 4), ("reading", 1))
LANGUAGE = Stage(
    "language",
    (Phase(282, SizedPlan(2000, SIZES, draw=False, turns=RELATION_TURNS)),),
    rates=(1e-3,),
    seed=2_000_000,
    warmup=20,
    floor=0.1,
    horizon=600,
)
LANGUAGE_PLACES = Stage(
    "language_places",
    (Phase(300, SizedPlan(1700, SIZES, draw=False, turns=RELATION_TURNS)),),
    rates=(1.5e-3,),
    seed=2_300_000,
    warmup=10,
    floor=0.2,
)
LANGUAGE_MORE = Stage(
    "language_more",
    (Phase(180, SizedPlan(1700, SIZES, draw=False, turns=RELATION_TURNS)),),
    rates=(1.5e-3,),
    seed=2_400_000,
    warmup=10,
    floor=0.1,
)
TURNS = (("attribute", 1), ("existence", 2), ("counting", 2), ("relation", 3), ("reading", 1))
JOINT = Stage(
    "joint",
    (Phase(400, SizedPlan(1200, SIZES, turns=TURNS)),),
    rates=(7e-4, 5e-4),
    seed=4_000_000,
    warmup=20,
    floor=0.03,
)
CHAINS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (("tower", "tower_full"), ("language", "language_places", "language_more")),
    (("joint",),),
)
"""The order of the stages: what stands in one inner group can run at the same time, chain by chain."""
STAGES = tuple(stage for step in CHAINS for chain in step for stage in chain)

SEEN: dict[str, float] = {"order": 2.0, "token_order": 2.0, "token_glyph": 2.0, "centre": 2.0, "token_centre": 2.0}
"""Weights of the tower's losses that are not 1."""
NOISE = 0.05
"""Deviation of what is added to symbolic tokens."""


class Workshop(Parts):
    """All parts of the model in training, and one method for each stage."""

    part_names = ("tower", "heads", "language", "guides", "codes")

    def __init__(self, out: Path, resume: bool = True) -> None:
        self.out, self.resume = out, resume
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        self.prompts = VisionPrompts(tokenizer)
        self.model = build_model()
        self.tower = self.model.model.visual
        self.language = self.model.model.language_model
        self.heads = TowerHeads()
        self.guides = Guides(tokenizer)
        self.codes = Codes()

    def take_codes(self) -> None:
        """Read the codes from the run's folder, or make them."""
        file = self.out / "codes.pt"
        if not file.exists():
            table = fit_codes()
            torch.save(table, self.out / "codes.new")
            (self.out / "codes.new").replace(file)
        self.codes.table.copy_(torch.load(file, weights_only=True))

    def train_tower(self, stage: Stage = TOWER) -> None:
        """Tower and merger alone, on labels and on the codes that the merged tokens are to be; small pictures first."""
        self.take_codes()

        def step(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            patches, tokens = look(self.tower, batch.pixels, batch.size)
            losses, right = self.heads(patches, tokens, batch.patches, batch.tokens)
            losses["match"] = self.match(batch.tokens, tokens)
            return total(losses, SEEN), {**losses, **right} if wanted else {}

        self._run(stage, ("tower", "heads"), [[self.tower, self.heads]], step)

    def train_tower_full(self, stage: Stage = TOWER_FULL) -> None:
        """The tower on pictures of full size and several shapes."""
        self.load("tower", "tower", "heads")
        self.train_tower(stage)

    def train_language(self, stage: Stage = LANGUAGE, guide: float = 0.3, vectors: float = 1.0) -> None:
        """Layers of the language model and the guides, on symbolic tokens; the embeddings stay.

        `guide` is the weight of the probes, `vectors` a factor for the rate of biases, norms and probes.
        """
        self.take_codes()

        def step(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            labels = blur(batch.tokens, float(torch.rand(()) * 0.3))
            visual = self.codes(labels)
            visual = visual + NOISE * torch.randn_like(visual)
            answers = answer(self.language, self.prompts, visual, batch.size, batch.ids, batch.targets)
            guides = self.guides(answers, batch.size, batch.ids, labels)
            ground = self.guides.ground(self.language, answers, batch.ids, labels)
            loss = answers.loss + 0.5 * answers.early + 0.3 * ground + guide * torch.stack([*guides.values()]).sum()
            figures: dict[str, float | Tensor] = {"answers": answers.loss, "early": answers.early, "ground": ground}
            return loss, {**figures, **guides, **by_task(batch, answers.right)} if wanted else {}

        learn = [[self.language.layers, self.language.norm, self.guides]]
        self._run(stage, ("language", "guides", "codes"), learn, step, vectors)

    def train_language_places(self, stage: Stage = LANGUAGE_PLACES) -> None:
        """The same with more weight on where things are."""
        self.load("language", "language", "guides", "codes")
        self.train_language(stage, guide=1.5, vectors=5.0)

    def train_joint(self, stage: Stage = JOINT) -> None:
        """Everything together on pictures and the answers; labels and probes stay on beside them."""
        self.load("language_more", "language", "guides", "codes")
        self.load("tower_full", "tower", "heads")

        def step(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            patches, tokens = look(self.tower, batch.pixels, batch.size)
            losses, right = self.heads(patches, tokens, batch.patches, batch.tokens)
            answers = answer(self.language, self.prompts, tokens, batch.size, batch.ids, batch.targets)
            guides = self.guides(answers, batch.size, batch.ids, batch.tokens)
            loss = answers.loss + 0.2 * answers.early + 0.1 * torch.stack([*guides.values()]).sum()
            figures: dict[str, float | Tensor] = {"answers": answers.loss, **guides, **by_task(batch, answers.right)}
            return loss + 0.25 * total(losses, SEEN), {**figures, **right} if wanted else {}

        learn = [[self.tower, self.heads], [self.language, self.guides]]
        self._run(stage, ("tower", "heads", "language", "guides", "codes"), learn, step)

    def train_language_more(self, stage: Stage = LANGUAGE_MORE) -> None:
        """More of the same."""
        self.load("language_places", "language", "guides", "codes")
        self.train_language(stage, guide=1.5, vectors=5.0)

    def match(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """How far merged tokens are from their codes, as a share of the codes' variance; glyphs weigh four times more."""
        goal = self.codes(labels)
        weight = torch.where(labels[:, 2] > 0, 4.0, torch.where(labels[:, 5] > 0, 1.0, 0.3))
        return (((tokens - goal) ** 2).mean(-1) * weight).sum() / (weight.sum() * goal.var())

    def _run(
        self, stage: Stage, names: Sequence[str], learn: Sequence[Sequence[nn.Module]], step: Step, vectors: float = 1.0
    ) -> None:
        parts = {name: self.parts[name] for name in names}
        optimizer = partial(MuonAdamW, vectors=vectors)
        run_stage(stage, parts, learn, step, self.out, self.resume, source=stream, make_optimizer=optimizer)
