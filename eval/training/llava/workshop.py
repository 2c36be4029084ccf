"""tiny-llava's parts in training, and what its stages ask of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from ..common.answer_kept import answer_kept
from ..common.bf16_attention import use_bf16_attention
from ..common.grounding import Grounding
from ..common.language import answer
from ..common.loop import Metrics, Stage
from ..common.losses import by_task, weighed
from ..common.optimizer import MuonAdamW
from .batches import Batch, make_batch
from .checkpoint import assemble, export
from .clip_workshop import BALANCE, ClipWorkshop
from .symbolic import blur_labels
from .tower import FEATURE_LAYER, looking_at, normalise, tower_config


class LlavaWorkshop(ClipWorkshop[Batch]):
    """The parts for pictures of one tile."""

    part_names = ("tower", "heads", "language", "symbolic", "projector", "places")
    make_batch = staticmethod(make_batch)
    clip = tower_config()

    def export(self, folder: Path) -> None:
        """Write the parts as an ordinary LLaVA checkpoint folder."""
        export(assemble(self.tower, self.projector, self.language), folder)

    def look(self, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states of the feature layer of a batch's pictures, and the tower's own losses."""
        with looking_at(self.tower, batch.window):
            seen = self.tower(pixel_values=normalise(batch.pixels), output_hidden_states=True)
        hidden = seen.hidden_states[FEATURE_LAYER]
        return hidden, self.heads(hidden, seen.pooler_output, batch.labels, batch.presence)

    def sight(self, batch: Batch, hidden: Tensor) -> dict[str, float]:
        """Accuracy of the patch labels."""
        return {f"acc_{name}": value for name, value in self.heads.accuracy(hidden, batch.labels).items()}

    def goal(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """Labels and symbolic tokens."""
        return batch.labels, self.symbolic(batch.labels, self.words, batch.window)

    def train_language(self, stage: Stage, nothing: bool = True, embeddings: bool = True) -> None:
        """Language model alone, on symbolic tokens of which some are forgotten, with grounding and early answers.

        Args:
            stage: the stage.
            nothing: whether words that name nothing are to look in front of the picture.
            embeddings: whether the embeddings of words and symbols learn too.
        """
        grounding = Grounding(self.prompts.tokenizer, nothing)

        def step(batch: Batch, wanted: bool) -> tuple[Tensor, Metrics]:
            labels = blur_labels(batch.labels, float(torch.rand(()) * 0.3))
            visual = self.symbolic(labels, self.words, batch.window)
            answers = answer(self.language, self.prompts.prefix, visual, batch.ids, batch.targets, early=True)
            ground = grounding(self.language.model, answers, batch.ids, labels)
            figures: Metrics = {"answers": answers.loss, "early": answers.early, "ground": ground}
            loss = answers.loss + 0.5 * answers.early + 0.3 * ground
            return loss, {**figures, **by_task(batch, answers.right)} if wanted else {}

        learn = [self.language, self.symbolic] if embeddings else self.decoder_layers
        self.run(stage, ("language", "symbolic"), [learn], step)

    def train_joint(self, stage: Stage, balance: Mapping[str, float] = BALANCE) -> None:
        """Everything together on real pictures and the answers; the tower's own losses stay on beside them."""

        def step(batch: Batch, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, losses = self.look(batch)
            visual = self.projector(hidden[:, 1:])
            answers = answer(self.language, self.prompts.prefix, visual, batch.ids, batch.targets)
            figures: Metrics = {}
            if wanted:
                figures = {"answers": answers.loss, **by_task(batch, answers.right), **self.sight(batch, hidden)}
            return answers.loss + 0.5 * weighed(losses, balance), figures

        self.run(stage, self.part_names, [[self.tower, self.heads, self.projector], [self.language]], step)

    def train_pruned(self, stage: Stage, probes: float = 0.3) -> None:
        """Projector and language model on the features of the finished tower, with tokens dropped as the plan says.

        Matrix products are in bf16.

        Args:
            stage: the stage.
            probes: weight of the probes that ask where things are.
        """
        use_bf16_attention(self.language)

        def step(batch: Batch, wanted: bool) -> tuple[Tensor, Metrics]:
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad(), looking_at(self.tower, batch.window):
                    pixels = normalise(batch.pixels)
                    hidden = self.tower(pixel_values=pixels, output_hidden_states=True).hidden_states[FEATURE_LAYER]
                visual = self.projector(hidden[:, 1:]).repeat(len(batch.kept) // len(hidden), 1, 1)
                answers, _, _ = answer_kept(
                    self.language, self.prompts.prefix, visual, batch.kept, batch.compact, batch.ids, batch.targets
                )
                where = self.places(answers, batch.places)
            figures: Metrics = {}
            if wanted:
                figures = {"answers": answers.loss, **where, **by_task(batch, answers.right)}
            return answers.loss + probes * weighed(where, {}), figures

        learn = [[self.projector], [self.language, self.places]]
        self.run(stage, self.part_names, learn, step, MuonAdamW)
