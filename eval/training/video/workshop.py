"""tiny-qwen2.5-vl-video's parts in training, and what each kind of stage asks of them."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..common.language import Answers
from ..common.loop import Metrics, Stage
from ..common.losses import by_task, weighed
from ..common.optimizer import MuonAdamW
from ..common.workshop import Workshop
from ..qwen.batches import SizedBatch
from ..qwen.codes import Codes, blur
from ..qwen.language import answer as answer_pictures
from ..qwen.model import TOKEN_SIZE
from ..qwen.tokenizer import VisionPrompts, build_tokenizer
from ..qwen.tower import TowerHeads, look
from ..qwen.workshop import SEEN
from .batches import ClipBatch, make_batch
from .clips import SIZE
from .codes import fit_codes
from .guides import ClipGuides, looking_back
from .language import answer
from .model import build_model, export
from .questions import WORDS

FAST = partial(torch.autocast, "cpu", torch.bfloat16)
"""Matrix products in bf16."""
SIDE = SIZE // TOKEN_SIZE
"""Rows and columns of visual tokens of a frame."""


class VideoWorkshop(Workshop):
    """Tower with merger and language model of tiny-qwen2.5-vl, and heads, guides and codes that only training uses."""

    part_names = ("tower", "heads", "language", "guides")
    make_batch = staticmethod(make_batch)
    prompts: VisionPrompts

    def __init__(self, out: Path, resume: bool = True, start: Path | None = None) -> None:
        super().__init__(out, resume, start)
        tokenizer = build_tokenizer(WORDS)
        self.prompts = VisionPrompts(tokenizer)
        self.model = build_model()
        self.tower = self.model.model.visual
        self.language = self.model.model.language_model
        self.heads = TowerHeads()
        self.guides = ClipGuides()

    def codes(self) -> tuple[Codes, Tensor]:
        """The code of visual tokens, from the run's folder or made, and the deviation of what is added to it."""
        file = self.out / "codes.pt"
        if not file.exists():
            torch.save(fit_codes(self.model, self.prompts), self.out / "codes.new")
            (self.out / "codes.new").replace(file)
        table = torch.load(file, weights_only=True)
        codes = Codes()
        codes.table.copy_(table[:-1])
        return codes, table[-1]

    def export(self, folder: Path) -> None:
        """Write the parts as an ordinary Qwen2.5-VL checkpoint folder."""
        export(self.model, folder)

    def ask(self, batch: ClipBatch, visual: Tensor) -> tuple[Answers, dict[str, Tensor], dict[str, float]]:
        """Answers about clips with tokens `visual` (batch, moments * tokens, width), and the guides' losses and figures."""
        with FAST():
            return self._ask(batch, visual)

    def _ask(self, batch: ClipBatch, visual: Tensor) -> tuple[Answers, dict[str, Tensor], dict[str, float]]:
        answers = answer(self.language, self.prompts, visual, batch.moments, SIDE, batch.ids, batch.targets)
        guides, right = self.guides(
            answers, len(self.prompts.prefix), batch.moments, batch.events, batch.ranks, batch.ways
        )
        return answers, guides, right

    def train_language(self, stage: Stage, look: float = 0.0) -> None:
        """The language model and the guides, on symbolic tokens; `look` is the weight of looking back."""
        codes, noise = self.codes()

        def step(batch: ClipBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            labels = blur(batch.labels, float(torch.rand(()) * 0.2))
            visual = codes(labels)
            visual = visual + noise * torch.randn_like(visual)
            answers, guides, right = self.ask(batch, visual)
            loss = answers.loss + 0.3 * answers.early + weighed(guides, {"own": 0.3})
            figures: dict[str, float | Tensor] = {"answers": answers.loss, "early": answers.early, **guides, **right}
            if look:
                with FAST():
                    back = looking_back(self.language, answers, len(self.prompts.prefix), batch.moments, labels[:, 0])
                loss = loss + look * back
                figures["back"] = back
            return loss, {**figures, **by_task(batch, answers.right)} if wanted else {}

        self.run(stage, ("language", "guides"), [[self.language, self.guides]], step, partial(MuonAdamW, vectors=3.0))

    def train_joint(self, stage: Stage) -> None:
        """Everything together on clips and pictures; labels and guides stay on beside the answers."""

        def pictures(batch: SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            with FAST():
                patches, tokens = look(self.tower, batch.pixels, batch.size)
                losses, _ = self.heads(patches, tokens, batch.patches, batch.tokens)
                answers = answer_pictures(self.language, self.prompts, tokens, batch.size, batch.ids, batch.targets)
            loss = answers.loss + 0.1 * answers.early + 0.1 * weighed(losses, SEEN)
            figures = {f"picture_{name}": value for name, value in by_task(batch, answers.right).items()}
            return loss, figures if wanted else {}

        def step(batch: ClipBatch | SizedBatch, wanted: bool) -> tuple[Tensor, Metrics]:
            if isinstance(batch, SizedBatch):
                return pictures(batch, wanted)
            with FAST():
                patches, tokens = look(self.tower, batch.pixels, (SIDE, SIDE))
                losses, seen = self.heads(patches, tokens, batch.patch_labels, batch.picture_labels)
            answers, guides, right = self.ask(batch, tokens[batch.shown].flatten(1, 2))
            loss = (
                answers.loss + 0.2 * answers.early + 0.3 * weighed(guides, {"own": 0.3}) + 0.15 * weighed(losses, SEEN)
            )
            figures: Metrics = {"answers": answers.loss, **guides, **right, **seen}
            return loss, {**figures, **by_task(batch, answers.right)} if wanted else {}

        learn: list[list[nn.Module]] = [[self.tower, self.heads], [self.language, self.guides]]
        self.run(stage, self.part_names, learn, step, MuonAdamW)
