"""tiny-llava-next's parts in training: tiny-llava's for tiles, and what joins tiles to one picture."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from ..common.answer_kept import answer_kept
from ..common.bf16_attention import use_bf16_attention
from ..common.dropping import gather_tokens
from ..common.grounding import Grounding
from ..common.language import answer
from ..common.loop import Metrics, Stage
from ..common.losses import by_task, weighed
from ..common.optimizer import MuonAdamW
from ..llava.clip_workshop import BALANCE, ClipWorkshop
from ..llava.symbolic import SymbolicTokens, blur_labels
from ..llava.tower import FEATURE_LAYER, GRID, normalise
from .answers import answer_in_two
from .batches import TileBatch, make_batch
from .checkpoint import assemble, export, tile_tower_config
from .insight import Insight
from .tiles import CELLS, FIRST, Stitcher, TileSymbols


class NextWorkshop(ClipWorkshop[TileBatch]):
    """The parts for pictures of several tiles; `start` is the folder of tiny-llava's training."""

    part_names = ("tower", "heads", "language", "symbolic", "projector", "stitcher", "insight", "places")
    make_batch = staticmethod(make_batch)
    clip = tile_tower_config()

    def __init__(self, out: Path, resume: bool = True, start: Path | None = None) -> None:
        super().__init__(out, resume, start)
        self.stitcher = Stitcher()
        self.insight = Insight()
        if start is not None:
            self._inherit(start)

    def make_symbols(self, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
        """tiny-llava's symbolic tokens, for tiles."""
        return TileSymbols(SymbolicTokens(tokenizer))

    def _inherit(self, start: Path) -> None:
        """Take over tiny-llava's weights; a tile has the position embeddings of the middle of its grid."""
        states = torch.load(start / "joint_more.pt", weights_only=True)["parts"]
        at = torch.arange(FIRST, FIRST + CELLS)
        places = (at[:, None] * GRID + at[None]).flatten()
        for name, table in states["tower"].items():
            if name.endswith("position_embedding.weight"):
                states["tower"][name] = table[torch.cat([torch.zeros(1, dtype=torch.long), places + 1])]
            elif name.endswith("position_ids"):
                states["tower"][name] = torch.arange(CELLS * CELLS + 1)[None]
        for name in ("tower", "heads", "language", "projector"):
            self.parts[name].load_state_dict(states[name])
        self.symbolic.symbols.load_state_dict(states["symbolic"])  # type: ignore[union-attr]

    def take(self, model: PreTrainedModel) -> None:
        """Take a checkpoint's tower, projector, newline and language model."""
        super().take(model)
        self.stitcher.newline.data.copy_(model.model.image_newline.data)

    def export(self, folder: Path) -> None:
        """Write the parts as an ordinary LLaVA-NeXT checkpoint folder."""
        export(assemble(self.tower, self.projector, self.language, self.stitcher), folder)

    def look(self, batch: TileBatch) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states `[tiles of all pictures, tokens, width]` of the feature layer, and the tower's own losses."""
        seen = self.tower(pixel_values=normalise(batch.pixels.flatten(0, 1)), output_hidden_states=True)
        hidden = seen.hidden_states[FEATURE_LAYER]
        losses = self.heads(hidden, seen.pooler_output, batch.tile_labels.flatten(0, 1), batch.presence.flatten(0, 1))
        return hidden, losses

    def sight(self, batch: TileBatch, hidden: Tensor) -> dict[str, float]:
        """Accuracy of the patch labels in thumbnails and in crops."""
        features = hidden.unflatten(0, batch.tile_labels.shape[:2])
        small = self.heads.accuracy(features[:, 0], batch.tile_labels[:, 0])
        crops = self.heads.accuracy(features[:, 1:].flatten(0, 1), batch.tile_labels[:, 1:].flatten(0, 1))
        figures = {f"small_{name}": small[name] for name in ("shape", "colour", "centre")}
        return figures | {f"crop_{name}": value for name, value in crops.items()}

    def goal(self, batch: TileBatch) -> tuple[Tensor, Tensor]:
        """Labels and symbolic tokens of all tiles."""
        tokens = self.symbolic(batch.tile_labels, self.words, batch.window)
        return batch.tile_labels.flatten(0, 1), tokens.flatten(0, 1)

    def train_language(self, stage: Stage, symbols: bool = True) -> None:
        """Layers of the language model on symbolic tokens of coarse tiles; the words' embeddings stay.

        Args:
            stage: the stage.
            symbols: whether the symbolic tokens' own embeddings learn too.
        """
        grounding = Grounding(self.prompts.tokenizer, nothing=True)

        def step(batch: TileBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            labels = blur_labels(batch.tile_labels.flatten(0, 1), float(torch.rand(()) * 0.2))
            tiles = self.symbolic(labels.unflatten(0, batch.tile_labels.shape[:2]), self.words, batch.window)
            visual = self.stitcher(tiles, batch.grid)
            answers = answer(self.language, self.prompts.prefix, visual, batch.ids, batch.targets, early=True)
            ground = grounding(self.language.model, answers, batch.ids, batch.labels)
            losses, figures = self.insight(answers, batch.labels, batch.places)
            told: Metrics = {"answers": answers.loss, "ground": ground, **figures, **by_task(batch, answers.right)}
            loss = answers.loss + 0.3 * answers.early + 0.2 * ground + 0.3 * weighed(losses, {})
            return loss, told if wanted else {}

        learn = [*self.decoder_layers, self.insight, *([self.symbolic, self.stitcher] if symbols else [])]
        self.run(stage, ("language", "symbolic", "stitcher", "insight", "places"), [learn], step)

    def train_joint(self, stage: Stage) -> None:
        """Everything together on real pictures and the answers; the tower's own losses stay on beside them."""

        def step(batch: TileBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, losses = self.look(batch)
            tiles = self.projector(hidden[:, 1:]).unflatten(0, batch.tile_labels.shape[:2])
            visual = self.stitcher(tiles, batch.grid)
            answers = answer_in_two(self.language, self.prompts.prefix, visual, batch.ids, batch.targets)
            inner, figures = self.insight(answers, batch.labels, batch.places)
            told: Metrics = {}
            if wanted:
                tasks, sight = by_task(batch, answers.right), self.sight(batch, hidden)
                told = {"answers": answers.loss, **figures, **tasks, **sight}
            return answers.loss + 0.3 * weighed(inner, {}) + 0.5 * weighed(losses, BALANCE), told

        learn = [[self.tower, self.heads, self.projector], [self.language, self.stitcher, self.insight]]
        self.run(stage, self.part_names, learn, step)

    def train_pruned(self, stage: Stage, probes: float = 0.3) -> None:
        """Projector, newline and language model on the finished tower's features, with tokens dropped as the plan says.

        Matrix products are in bf16.

        Args:
            stage: the stage.
            probes: weight of the heads that ask where things are and what is printed.
        """
        use_bf16_attention(self.language)

        def step(batch: TileBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    pixels = normalise(batch.pixels.flatten(0, 1))
                    hidden = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
                tiles = self.projector(hidden[:, 1:]).unflatten(0, batch.tile_labels.shape[:2])
                visual = self.stitcher(tiles, batch.grid)
                visual = visual.repeat(len(batch.kept) // len(visual), 1, 1)
                answers, index, valid = answer_kept(
                    self.language, self.prompts.prefix, visual, batch.kept, batch.compact, batch.ids, batch.targets
                )
                where = self.places(answers, batch.places)
                seen = gather_tokens(batch.labels.transpose(1, 2), index) * valid[..., None]
                inner, figures = self.insight(answers, seen.transpose(1, 2), batch.places)
            losses = {**where, "llm_glyph": inner["llm_glyph"], "llm_order": inner["llm_order"]}
            told: Metrics = {"answers": answers.loss, **where, **figures, **by_task(batch, answers.right)}
            return answers.loss + probes * weighed(losses, {}), told if wanted else {}

        learn = [[self.projector], [self.language, self.stitcher, self.insight, self.places]]
        self.run(stage, self.part_names, learn, step, MuonAdamW)
