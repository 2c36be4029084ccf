"""The stages of the training, with the schedule that the shipped checkpoint was trained with.

The schedule is what was really run, watched and lengthened on the way: hence several stages of one kind.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor, nn
from transformers import CLIPVisionModel, LlamaForCausalLM

from ..common.grounding import Grounding
from ..common.language import Prompts, answer, language_config, prepare
from ..common.loop import Metrics, Parts, Phase, Stage, run_stage
from ..common.tokenizer import build_tokenizer
from .batches import BUSY, CROWDED, DENSE, FULL, TOY, Batch, BatchPlan
from .checkpoint import build_projector
from .symbolic import SymbolicTokens, blur_labels
from .tower import FEATURE_LAYER, TowerHeads, looking_at, normalise, tower_config

TURNS = (("attribute", 2), ("existence", 2), ("counting", 1), ("relation", 2), ("reading", 1))

TOWER = Stage(
    "tower",
    (Phase(1500, BatchPlan(32, CROWDED)),),
    rates=(1e-3,),
    seed=1_000_000,
    floor=0.2,
)
TOWER_FULL = Stage(
    "tower_full", (Phase(300, BatchPlan(12, FULL)),), rates=(5e-4,), seed=1_500_000, warmup=30, floor=0.2
)
TOWER_MORE = Stage(
    "tower_more", (Phase(350, BatchPlan(12, FULL)),), rates=(7e-4,), seed=1_700_000, warmup=30, floor=0.1
)
TOWER_DENSE = Stage(
    "tower_dense", (Phase(400, BatchPlan(12, DENSE)),), rates=(8e-4,), seed=1_800_000, warmup=20, floor=0.1
)
TOWER_LAST = Stage(
    "tower_last", (Phase(130, BatchPlan(12, DENSE)),), rates=(4e-4,), seed=1_900_000, warmup=10, floor=0.1
)
LANGUAGE = Stage(
    "language",
    (Phase(700, BatchPlan(24, TOY, draw=False, turns=TURNS)),),
    rates=(1.5e-3,),
    seed=2_000_000,
    floor=0.5,
)
LANGUAGE_MORE = Stage(
    "language_more",
    (Phase(400, BatchPlan(24, TOY, draw=False, turns=TURNS)),),
    rates=(1.5e-3,),
    seed=2_300_000,
    warmup=20,
    floor=0.3,
)
HARD_TURNS = (("attribute", 1), ("existence", 1), ("counting", 2), ("relation", 5), ("reading", 1))
LANGUAGE_HARD = Stage(
    "language_hard",
    (Phase(220, BatchPlan(20, TOY, draw=False, turns=HARD_TURNS)),),
    rates=(1.2e-3,),
    seed=2_400_000,
    warmup=20,
    floor=0.4,
)
LANGUAGE_FULL = Stage(
    "language_full",
    (Phase(160, BatchPlan(8, FULL, draw=False, turns=TURNS)),),
    rates=(7e-4,),
    seed=2_500_000,
    warmup=30,
    floor=0.3,
)
BRIDGE = Stage("bridge", (Phase(140, BatchPlan(12, DENSE)),), rates=(2e-3, 4e-4), seed=3_000_000, warmup=20)
JOINT = Stage(
    "joint",
    (Phase(201, BatchPlan(12, BUSY, turns=TURNS)),),
    rates=(6e-4, 4e-4),
    seed=4_000_000,
    warmup=30,
    floor=0.03,
    horizon=600,
)
JOINT_MORE = Stage(
    "joint_more",
    (Phase(460, BatchPlan(12, BUSY, turns=TURNS)),),
    rates=(5e-4, 4e-4),
    seed=5_000_000,
    warmup=20,
    floor=0.02,
)
BALANCE = {"shape": 2.0, "colour": 1.0, "glyph": 2.0, "order": 8.0, "centre": 1.0, "cls": 0.4, "cls_early": 0.4}
"""Weights of the tower's losses in the last stage: more for what few patches show."""


CHAINS: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        ("tower", "tower_full", "tower_more", "tower_dense", "tower_last"),
        ("language", "language_more", "language_hard", "language_full"),
    ),
    (("bridge",),),
    (("joint", "joint_more"),),
)
"""The order of the stages: what stands in one inner group can run at the same time, chain by chain."""
STAGES = tuple(stage for step in CHAINS for chain in step for stage in chain)


class Workshop(Parts):
    """All parts of the model in training, and one method for each stage."""

    part_names = ("tower", "heads", "language", "symbolic", "projector")

    def __init__(self, out: Path, resume: bool = True) -> None:
        self.out, self.resume = out, resume
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        self.prompts = Prompts(tokenizer)
        self.tower = CLIPVisionModel(tower_config())
        self.heads = TowerHeads()
        self.language = LlamaForCausalLM(language_config(tokenizer))
        prepare(self.language, tokenizer)
        self.symbolic = SymbolicTokens(tokenizer)
        self.projector = build_projector(tokenizer)

    def look(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Hidden states of the feature layer and the pooled CLS token of a batch's pictures."""
        with looking_at(self.tower, batch.window):
            seen = self.tower(pixel_values=normalise(batch.pixels), output_hidden_states=True)
        return seen.hidden_states[FEATURE_LAYER], seen.pooler_output

    def train_tower(self, stage: Stage = TOWER) -> None:
        """Tower alone, on the labels of the patches and what the CLS token must know; small pictures first."""

        def step(batch: Batch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, pooled = self.look(batch)
            losses = self.heads(hidden, pooled, batch.labels, batch.presence)
            figures: dict[str, float | Tensor] = (
                {**losses, **_named("acc", self.heads.accuracy(hidden, batch.labels))} if wanted else {}
            )
            return torch.stack([*losses.values()]).sum(), figures

        parts = {name: self.parts[name] for name in ("tower", "heads")}
        run_stage(stage, parts, [parts.values()], step, self.out, self.resume)

    def train_tower_full(self, stage: Stage = TOWER_FULL) -> None:
        """The tower again, on pictures of full size."""
        self.load("tower", "tower", "heads")
        self.train_tower(stage)

    def train_tower_more(self, stage: Stage = TOWER_MORE) -> None:
        """The tower once more on pictures of full size, from a higher rate."""
        self.load("tower_full", "tower", "heads")
        self.train_tower(stage)

    def train_tower_dense(self, stage: Stage = TOWER_DENSE) -> None:
        """The tower on pictures of full size with twice as many things, so that each picture teaches more."""
        self.load("tower_more", "tower", "heads")
        self.train_tower(stage)

    def train_tower_last(self, stage: Stage = TOWER_LAST) -> None:
        """A little more of the same at a lower rate."""
        self.load("tower_dense", "tower", "heads")
        self.train_tower(stage)

    def train_language(self, stage: Stage = LANGUAGE, nothing: bool = False, learn: Sequence[nn.Module] = ()) -> None:
        """Language model alone, on symbolic tokens of a small grid, with grounding and early answers."""
        grounding = Grounding(self.prompts.tokenizer, nothing)

        def step(batch: Batch, wanted: bool) -> tuple[Tensor, Metrics]:
            labels, visual = self.imagine(batch)
            answers = answer(self.language, self.prompts.prefix, visual, batch.ids, batch.targets, early=True)
            ground = grounding(self.language, answers, batch.ids, labels)
            figures: dict[str, float | Tensor] = {
                "answers": answers.loss,
                "early": answers.early,
                "ground": ground,
                **by_task(batch, answers.right),
            }
            return answers.loss + 0.5 * answers.early + 0.3 * ground, figures if wanted else {}

        parts = {name: self.parts[name] for name in ("language", "symbolic")}
        run_stage(stage, parts, [learn or parts.values()], step, self.out, self.resume)

    def train_language_more(self, stage: Stage = LANGUAGE_MORE) -> None:
        """The same once more, where words that name nothing learn to look in front of the picture."""
        self.load("language", "language", "symbolic")
        self.train_language(stage, nothing=True)

    def train_language_hard(self, stage: Stage = LANGUAGE_HARD) -> None:
        """The same with mostly relation and counting questions; from here on the embeddings stay."""
        self.load("language_more", "language", "symbolic")
        self.train_language(stage, nothing=True, learn=[self.language.model.layers, self.language.model.norm])

    def train_language_full(self, stage: Stage = LANGUAGE_FULL) -> None:
        """Layers of the language model on symbolic tokens of the whole grid; the embeddings stay."""
        self.load("language_hard", "language", "symbolic")
        self.train_language(stage, nothing=True, learn=[self.language.model.layers, self.language.model.norm])

    def imagine(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels with some forgotten, and the symbolic tokens that say what is left."""
        labels = blur_labels(batch.labels, float(torch.rand(()) * 0.3))
        return labels, self.symbolic(labels, self.language.get_input_embeddings().weight, batch.window)

    def train_bridge(self, stage: Stage = BRIDGE) -> None:
        """Projector (and, slowly, the tower): turn the tower's features into the symbolic tokens."""
        self.load("tower_last", "tower", "heads")
        self.load("language_more", "language", "symbolic")

        def step(batch: Batch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, pooled = self.look(batch)
            losses = self.heads(hidden, pooled, batch.labels, batch.presence)
            loss = self.match(batch, hidden)
            figures: dict[str, float | Tensor] = (
                {"match": loss, **_named("acc", self.heads.accuracy(hidden, batch.labels))} if wanted else {}
            )
            return 4 * loss + torch.stack([*losses.values()]).sum(), figures

        run_stage(stage, self.parts, [[self.projector], [self.tower, self.heads]], step, self.out, self.resume)

    def match(self, batch: Batch, hidden: Tensor) -> Tensor:
        """How far the projected features are from the symbolic tokens, as a share of the tokens' variance."""
        with torch.no_grad():
            goal = self.symbolic(batch.labels, self.language.get_input_embeddings().weight, batch.window)
        weight = torch.where((batch.labels > 0).any(1), 1.0, 0.3)[..., None]
        error = (self.projector(hidden[:, 1:]) - goal) ** 2
        return (error * weight).mean() / goal.var()

    def train_joint(self) -> None:
        """Everything together on real pictures and the answers; the tower's own losses stay on beside them."""
        self.load("bridge")
        self.load("language_full", "language")
        self._train_together(JOINT, dict.fromkeys(BALANCE, 1.0))

    def train_joint_more(self) -> None:
        """The rest of it, with the tower's losses in better balance."""
        self.load("joint")
        self._train_together(JOINT_MORE, BALANCE)

    def _train_together(self, stage: Stage, balance: Mapping[str, float]) -> None:
        def step(batch: Batch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, pooled = self.look(batch)
            losses = self.heads(hidden, pooled, batch.labels, batch.presence)
            visual = self.projector(hidden[:, 1:])
            answers = answer(self.language, self.prompts.prefix, visual, batch.ids, batch.targets)
            figures: dict[str, float | Tensor] = (
                {"answers": answers.loss, **by_task(batch, answers.right)} if wanted else {}
            )
            if wanted:
                figures |= _named("acc", self.heads.accuracy(hidden, batch.labels))
            seen = torch.stack([balance[name] * loss for name, loss in losses.items()]).sum()
            return answers.loss + 0.5 * seen, figures

        learn = [[self.tower, self.heads, self.projector], [self.language]]
        run_stage(stage, self.parts, learn, step, self.out, self.resume)


class Asked(Protocol):
    """A batch that knows the task of each question of each picture."""

    tasks: list[list[str]]


def by_task(batch: Asked, right: Tensor) -> dict[str, float]:
    """Share of right answers of each task in a batch."""
    found: dict[str, list[bool]] = {}
    for tasks, row in zip(batch.tasks, right.tolist(), strict=True):
        for task, hit in zip(tasks, row, strict=True):
            found.setdefault(task, []).append(hit)
    return {task: sum(hits) / len(hits) for task, hits in found.items()}


def _named(prefix: str, figures: dict[str, float]) -> dict[str, float]:
    return {f"{prefix}_{name}": value for name, value in figures.items()}


__all__ = [
    "BRIDGE",
    "CHAINS",
    "JOINT",
    "LANGUAGE",
    "LANGUAGE_FULL",
    "LANGUAGE_MORE",
    "STAGES",
    "TOWER",
    "TOWER_FULL",
    "TOWER_MORE",
    "TURNS",
    "Workshop",
    "by_task",
]
