"""tiny-qwen2.5-vl's parts in training, and what each kind of stage asks of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from ..common.bf16_attention import use_bf16_attention
from ..common.loop import Metrics, Stage
from ..common.losses import by_task, weighed
from ..common.optimizer import MuonAdamW
from ..common.workshop import Workshop
from .batches import SizedBatch, make_batch
from .codes import Codes, blur, fit_codes
from .guides import Guides
from .language import answer, answer_kept
from .model import build_model, export
from .tokenizer import VisionPrompts, build_tokenizer
from .tower import TowerHeads, look

SEEN: dict[str, float] = {"order": 2.0, "token_order": 2.0, "token_glyph": 2.0, "centre": 2.0, "token_centre": 2.0}
"""Weights of the tower's losses that are not 1."""
NOISE = 0.05
"""Deviation of what is added to symbolic tokens."""


class QwenWorkshop(Workshop):
    """Tower with merger and language model, and the heads, guides and codes that only training uses."""

    part_names = ("tower", "heads", "language", "guides", "codes")
    make_batch = staticmethod(make_batch)
    prompts: VisionPrompts

    def __init__(self, out: Path, resume: bool = True, start: Path | None = None) -> None:
        super().__init__(out, resume, start)
        tokenizer = build_tokenizer()
        self.prompts = VisionPrompts(tokenizer)
        self.model = build_model()
        self.tower = self.model.model.visual
        self.language = self.model.model.language_model
        self.heads = TowerHeads()
        self.guides = Guides(tokenizer)
        self.codes = Codes()

    def prepare(self) -> None:
        """Read the codes from the run's folder, or make them."""
        file = self.out / "codes.pt"
        if not file.exists():
            table = fit_codes()
            torch.save(table, self.out / "codes.new")
            (self.out / "codes.new").replace(file)
        self.codes.table.copy_(torch.load(file, weights_only=True))

    def export(self, folder: Path) -> None:
        """Write the parts as an ordinary Qwen2.5-VL checkpoint folder."""
        export(self.model, folder)

    def take(self, model: PreTrainedModel) -> None:
        """Take all weights of a checkpoint."""
        self.model.load_state_dict(model.state_dict())

    def match(self, labels: Tensor, tokens: Tensor) -> Tensor:
        """How far merged tokens are from their codes, as a share of the codes' variance; glyphs weigh four times more."""
        goal = self.codes(labels)
        weight = torch.where(labels[:, 2] > 0, 4.0, torch.where(labels[:, 5] > 0, 1.0, 0.3))
        return (((tokens - goal) ** 2).mean(-1) * weight).sum() / (weight.sum() * goal.var())

    def train_tower(self, stage: Stage) -> None:
        """Tower and merger alone, on labels and on the codes that the merged tokens are to be."""
        self.prepare()

        def step(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            patches, tokens = look(self.tower, batch.pixels, batch.size)
            losses, right = self.heads(patches, tokens, batch.patches, batch.tokens)
            losses["match"] = self.match(batch.tokens, tokens)
            return weighed(losses, SEEN), {**losses, **right} if wanted else {}

        self.run(stage, ("tower", "heads"), [[self.tower, self.heads]], step, MuonAdamW)

    def train_language(self, stage: Stage, guide: float = 0.3, vectors: float = 1.0) -> None:
        """Layers of the language model and the guides, on symbolic tokens; the embeddings stay.

        Args:
            stage: the stage.
            guide: weight of the probes.
            vectors: factor for the rate of biases, norms and probes.
        """
        self.prepare()

        def step(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            labels = blur(batch.tokens, float(torch.rand(()) * 0.3))
            visual = self.codes(labels)
            visual = visual + NOISE * torch.randn_like(visual)
            answers = answer(self.language, self.prompts, visual, batch.size, batch.ids, batch.targets)
            guides = self.guides(answers, batch.size, batch.ids, labels)
            ground = self.guides.grounding(self.language, answers, batch.ids, labels, after=len(self.prompts.suffix))
            loss = answers.loss + 0.5 * answers.early + 0.3 * ground + guide * weighed(guides, {})
            figures: Metrics = {"answers": answers.loss, "early": answers.early, "ground": ground, **guides}
            return loss, {**figures, **by_task(batch, answers.right)} if wanted else {}

        learn = [[self.language.layers, self.language.norm, self.guides]]
        self.run(stage, ("language", "guides", "codes"), learn, step, partial(MuonAdamW, vectors=vectors))

    def train_joint(self, stage: Stage) -> None:
        """Everything together on pictures and the answers; labels and probes stay on beside them."""

        def step(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            patches, tokens = look(self.tower, batch.pixels, batch.size)
            losses, right = self.heads(patches, tokens, batch.patches, batch.tokens)
            answers = answer(self.language, self.prompts, tokens, batch.size, batch.ids, batch.targets)
            guides = self.guides(answers, batch.size, batch.ids, batch.tokens)
            loss = answers.loss + 0.2 * answers.early + 0.1 * weighed(guides, {}) + 0.25 * weighed(losses, SEEN)
            figures: Metrics = {"answers": answers.loss, **guides, **right}
            return loss, {**figures, **by_task(batch, answers.right)} if wanted else {}

        learn = [[self.tower, self.heads], [self.language, self.guides]]
        self.run(stage, self.part_names, learn, step, MuonAdamW)

    def train_pruned(self, stage: Stage) -> None:
        """Layers of the language model on the finished tower's tokens, of which some are dropped as the plan says.

        Matrix products are in bf16.
        """
        use_bf16_attention(self.language)

        def step(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            with torch.autocast("cpu", torch.bfloat16):
                with torch.no_grad():
                    _, tokens = look(self.tower, batch.pixels, batch.size)
                tokens = tokens.repeat(len(batch.kept) // len(tokens), 1, 1)
                answers = answer_kept(
                    self.language, self.prompts, tokens, batch.size, batch.kept, batch.ids, batch.targets
                )
            return answers.loss, {"answers": answers.loss, **by_task(batch, answers.right)} if wanted else {}

        learn = [[self.language.layers, self.language.norm]]
        self.run(stage, ("tower", "heads", "language"), learn, step, MuonAdamW)
