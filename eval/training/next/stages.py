"""The stages of the training, with the schedule that the shipped checkpoint was trained with."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM

from ..common.grounding import Grounding
from ..common.language import Prompts, answer, language_config
from ..common.loop import Metrics, Parts, Phase, Stage, run_stage
from ..common.tokenizer import build_tokenizer
from ..llava.checkpoint import build_projector
from ..llava.stages import BALANCE, by_task
from ..llava.symbolic import SymbolicTokens, blur_labels
from ..llava.tower import FEATURE_LAYER, GRID, TowerHeads, normalise, tower_config
from .answers import answer_in_two
from .batches import ALL_GRIDS, COARSE_GRIDS, SMALL_GRIDS, SQUARE, TEST_GRIDS, TileBatch, TilePlan, stream
from .insight import Insight
from .tiles import CELLS, FIRST, TILE, Stitcher, TileSymbols

TURNS = (("attribute", 2), ("existence", 2), ("counting", 2), ("relation", 3), ("reading", 1))
MANY_TURNS = (("attribute", 3), ("existence", 3), ("counting", 4), ("relation", 5), ("reading", 1))
READING_TURNS = (("attribute", 2), ("existence", 2), ("counting", 4), ("relation", 5), ("reading", 3))

TOWER = Stage(
    "tower",
    (Phase(330, TilePlan(6, SQUARE, things=(5, 9))),),
    rates=(6e-4,),
    seed=11_000_000,
    warmup=20,
    floor=0.15,
)
TOWER_MORE = Stage(
    "tower_more",
    (Phase(260, TilePlan(6, ALL_GRIDS, things=(5, 9))),),
    rates=(5e-4,),
    seed=11_500_000,
    warmup=10,
    floor=0.1,
)
LANGUAGE = Stage(
    "language",
    (Phase(300, TilePlan(16, SQUARE, cells=6, things=(3, 5), radius=(8.0, 11.0), draw=False, turns=TURNS)),),
    rates=(1e-3,),
    seed=12_000_000,
    warmup=20,
    floor=0.2,
)
LANGUAGE_MORE = Stage(
    "language_more",
    (Phase(130, TilePlan(16, COARSE_GRIDS, cells=6, things=(3, 5), radius=(8.0, 11.0), draw=False, turns=TURNS)),),
    rates=(8e-4,),
    seed=12_500_000,
    warmup=10,
    floor=0.2,
)
BRIDGE = Stage("bridge", (Phase(60, TilePlan(6, SQUARE)),), rates=(1.5e-3, 3e-4), seed=13_000_000, warmup=10)
JOINT = Stage(
    "joint",
    (Phase(150, TilePlan(6, SMALL_GRIDS, turns=MANY_TURNS)), Phase(150, TilePlan(6, ALL_GRIDS, turns=MANY_TURNS))),
    rates=(5e-4, 6e-4),
    seed=14_000_000,
    warmup=15,
    floor=0.1,
)
JOINT_MORE = Stage(
    "joint_more",
    (Phase(141, TilePlan(6, TEST_GRIDS, turns=READING_TURNS)),),
    rates=(4e-4, 5e-4),
    seed=15_000_000,
    warmup=5,
    floor=0.02,
    horizon=200,
)
JOINT_LAST = Stage(
    "joint_last",
    (Phase(120, TilePlan(6, TEST_GRIDS, turns=READING_TURNS, broken=0.5)),),
    rates=(3e-4, 4.5e-4),
    seed=16_000_000,
    warmup=5,
    floor=0.02,
)
STAGES = ("tower", "tower_more", "language", "language_more", "bridge", "joint", "joint_more", "joint_last")


class Workshop(Parts):
    """All parts of the model in training, and one method for each stage; `start` is the folder of tiny-llava's training."""

    part_names = ("tower", "heads", "language", "symbolic", "projector", "stitcher", "insight")

    def __init__(self, start: Path, out: Path, resume: bool = True) -> None:
        self.start, self.out, self.resume = start, out, resume
        torch.manual_seed(0)
        tokenizer = build_tokenizer()
        self.prompts = Prompts(tokenizer)
        self.tower = CLIPVisionModel(tile_tower_config())
        self.heads = TowerHeads()
        self.language = LlamaForCausalLM(language_config(tokenizer))
        self.symbolic = TileSymbols(SymbolicTokens(tokenizer))
        self.projector = build_projector(tokenizer)
        self.stitcher = Stitcher()
        self.insight = Insight()
        self.inherit()

    def inherit(self) -> None:
        """Take over tiny-llava's weights; a tile has the position embeddings of the middle of its grid."""
        states = torch.load(self.start / "joint_more.pt", weights_only=True)["parts"]
        for name, table in states["tower"].items():
            if name.endswith("position_embedding.weight"):
                states["tower"][name] = table[torch.cat([torch.zeros(1, dtype=torch.long), tile_positions() + 1])]
            elif name.endswith("position_ids"):
                states["tower"][name] = torch.arange(CELLS * CELLS + 1)[None]
        for name in ("tower", "heads", "language", "projector"):
            self.parts[name].load_state_dict(states[name])
        self.symbolic.symbols.load_state_dict(states["symbolic"])

    def look(self, batch: TileBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states (tiles of all pictures, tokens, width) of the feature layer, and the tower's own losses."""
        seen = self.tower(pixel_values=normalise(batch.pixels.flatten(0, 1)), output_hidden_states=True)
        hidden = seen.hidden_states[FEATURE_LAYER]
        losses = self.heads(hidden, seen.pooler_output, batch.tile_labels.flatten(0, 1), batch.presence.flatten(0, 1))
        return hidden, losses

    def train_tower(self, stage: Stage = TOWER) -> None:
        """Tower alone, on what the patches of the tiles show and what the CLS token must know."""

        def step(batch: TileBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, losses = self.look(batch)
            return weighed(losses), self.sight(batch, hidden) if wanted else {}

        parts = {name: self.parts[name] for name in ("tower", "heads")}
        run_stage(stage, parts, [parts.values()], step, self.out, self.resume, source=stream)

    def train_tower_more(self, stage: Stage = TOWER_MORE) -> None:
        """The tower on pictures of all sizes; the first tile of those that are not square is distorted."""
        self.load("tower", "tower", "heads")
        self.train_tower(stage)

    def sight(self, batch: TileBatch, hidden: Tensor) -> dict[str, float]:
        """Accuracy of the patch labels in thumbnails and in crops."""
        features = hidden.unflatten(0, batch.tile_labels.shape[:2])
        small = self.heads.accuracy(features[:, 0], batch.tile_labels[:, 0])
        crops = self.heads.accuracy(features[:, 1:].flatten(0, 1), batch.tile_labels[:, 1:].flatten(0, 1))
        return {f"small_{k}": small[k] for k in ("shape", "colour", "centre")} | {
            f"crop_{k}": v for k, v in crops.items()
        }

    def train_language(self, stage: Stage = LANGUAGE, fixed_symbols: bool = False) -> None:
        """Layers of the language model on symbolic tokens of coarse tiles; the words' embeddings stay."""
        grounding = Grounding(self.prompts.tokenizer, nothing=True)
        layers: Sequence[nn.Module] = [self.language.model.layers, self.language.model.norm]

        def step(batch: TileBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            visual = self.stitcher(self.imagine(batch), batch.grid)
            answers = answer(self.language, self.prompts.prefix, visual, batch.ids, batch.targets, early=True)
            ground = grounding(self.language, answers, batch.ids, batch.labels)
            losses, figures = self.insight(answers, batch.labels, batch.places)
            told: Metrics = {"answers": answers.loss, "ground": ground, **figures, **by_task(batch, answers.right)}
            loss = answers.loss + 0.3 * answers.early + 0.2 * ground + 0.3 * torch.stack([*losses.values()]).sum()
            return loss, told if wanted else {}

        parts = {name: self.parts[name] for name in ("language", "symbolic", "stitcher", "insight")}
        learn = [*layers, self.insight, *([] if fixed_symbols else [self.symbolic, self.stitcher])]
        run_stage(stage, parts, [learn], step, self.out, self.resume, source=stream)

    def train_language_more(self, stage: Stage = LANGUAGE_MORE) -> None:
        """The same on pictures of several sizes; the symbolic tokens stay as they are."""
        self.load("language", "language", "symbolic", "stitcher", "insight")
        self.train_language(stage, fixed_symbols=True)

    def imagine(self, batch: TileBatch) -> Tensor:
        """Symbolic tokens (batch, tiles, patches, width) of what the tiles show, some of it forgotten."""
        labels = blur_labels(batch.tile_labels.flatten(0, 1), float(torch.rand(()) * 0.2))
        words = self.language.get_input_embeddings().weight
        return self.symbolic(labels.unflatten(0, batch.tile_labels.shape[:2]), words, batch.window)

    def train_bridge(self, stage: Stage = BRIDGE) -> None:
        """Projector (and, slowly, the tower): turn the tower's features into the symbolic tokens."""
        self.load("tower_more", "tower", "heads")
        self.load("language", "language", "symbolic", "stitcher", "insight")

        def step(batch: TileBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, losses = self.look(batch)
            with torch.no_grad():
                words = self.language.get_input_embeddings().weight
                goal = self.symbolic(batch.tile_labels, words, batch.window).flatten(0, 1)
            weight = torch.where((batch.tile_labels > 0).any(2), 1.0, 0.3).flatten(0, 1)[..., None]
            match = (weight * (self.projector(hidden[:, 1:]) - goal) ** 2).mean() / goal.var()
            return 4 * match + weighed(losses), {"match": match, **self.sight(batch, hidden)} if wanted else {}

        learn = [[self.projector], [self.tower, self.heads]]
        run_stage(stage, self.parts, learn, step, self.out, self.resume, source=stream)

    def train_joint(self, stage: Stage = JOINT) -> None:
        """Everything together on real pictures and the answers; the tower's own losses stay on beside them."""
        self.load("bridge")
        self.load("language_more", "language", "insight")
        self._train_together(stage)

    def train_joint_more(self, stage: Stage = JOINT_MORE) -> None:
        """The rest of it, mostly on pictures of the test sets' sizes and with more weight on reading."""
        self.load("joint")
        self._train_together(stage)

    def train_joint_last(self, stage: Stage = JOINT_LAST) -> None:
        """The same with more strings that run over the edge between two crops."""
        self.load("joint_more")
        self._train_together(stage)

    def _train_together(self, stage: Stage) -> None:
        def step(batch: TileBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, losses = self.look(batch)
            tiles = self.projector(hidden[:, 1:]).unflatten(0, batch.tile_labels.shape[:2])
            visual = self.stitcher(tiles, batch.grid)
            answers = answer_in_two(self.language, self.prompts.prefix, visual, batch.ids, batch.targets)
            inner, figures = self.insight(answers, batch.labels, batch.places)
            told: dict[str, float | Tensor] = {}
            if wanted:
                told = {
                    "answers": answers.loss,
                    **figures,
                    **by_task(batch, answers.right),
                    **self.sight(batch, hidden),
                }
            return answers.loss + 0.3 * torch.stack([*inner.values()]).sum() + 0.5 * weighed(losses), told

        learn = [[self.tower, self.heads, self.projector], [self.language, self.stitcher, self.insight]]
        run_stage(stage, self.parts, learn, step, self.out, self.resume, source=stream)


def tile_tower_config() -> CLIPVisionConfig:
    """tiny-llava's tower for pictures of one tile."""
    config = tower_config()
    config.image_size = TILE
    return config


def tile_positions() -> Tensor:
    """Indices of a tile's patches on tiny-llava's grid."""
    at = torch.arange(FIRST, FIRST + CELLS)
    return (at[:, None] * GRID + at[None]).flatten()


def weighed(losses: dict[str, Tensor]) -> Tensor:
    """Sum of the tower's losses in the balance of tiny-llava's last stage."""
    return torch.stack([BALANCE[name] * loss for name, loss in losses.items()]).sum()
