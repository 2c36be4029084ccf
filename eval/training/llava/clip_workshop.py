"""What tiny-llava's and tiny-llava-next's trainings share: the parts around a CLIP tower, and the stages that look alike."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ..common.language import Prompts, language_config, prepare
from ..common.loop import Metrics, Stage
from ..common.losses import weighed
from ..common.places import Places
from ..common.tokenizer import build_tokenizer
from ..common.workshop import Workshop
from .checkpoint import build_projector
from .symbolic import SymbolicTokens
from .tower import TowerHeads

BatchT = TypeVar("BatchT")
BALANCE = {"shape": 2.0, "colour": 1.0, "glyph": 2.0, "order": 8.0, "centre": 1.0, "cls": 0.4, "cls_early": 0.4}
"""Weights of the tower's losses in the last stages: more for what few patches show."""


class ClipWorkshop(Workshop, Generic[BatchT]):
    """Tower, language model and projector, and the heads and symbolic tokens that only training uses."""

    clip: CLIPVisionConfig

    def __init__(self, out: Path, resume: bool = True, start: Path | None = None) -> None:
        super().__init__(out, resume, start)
        tokenizer = build_tokenizer()
        self.prompts = Prompts(tokenizer)
        self.tower = CLIPVisionModel(self.clip)
        self.heads = TowerHeads()
        self.language = LlamaForCausalLM(language_config(tokenizer))
        prepare(self.language, tokenizer)
        self.symbolic = self.make_symbols(tokenizer)
        self.projector = build_projector(tokenizer)
        self.places = Places()

    def make_symbols(self, tokenizer: PreTrainedTokenizerFast) -> nn.Module:
        """The module that writes labels as visual tokens."""
        return SymbolicTokens(tokenizer)

    def take(self, model: PreTrainedModel) -> None:
        """Take a checkpoint's tower, projector and language model."""
        self.tower.load_state_dict(model.model.vision_tower.state_dict())
        self.projector.load_state_dict(model.model.multi_modal_projector.state_dict())
        self.language.model.load_state_dict(model.model.language_model.state_dict())

    @property
    def words(self) -> Tensor:
        """The embedding matrix of the language model."""
        return self.language.get_input_embeddings().weight

    @property
    def decoder_layers(self) -> list[nn.Module]:
        """The language model without its embeddings."""
        return [self.language.model.layers, self.language.model.norm]

    def look(self, batch: BatchT) -> tuple[Tensor, dict[str, Tensor]]:
        """Hidden states `[pictures, tokens, width]` of the feature layer, and the tower's own losses."""
        raise NotImplementedError

    def sight(self, batch: BatchT, hidden: Tensor) -> dict[str, float]:
        """Accuracy of the patch labels."""
        raise NotImplementedError

    def goal(self, batch: BatchT) -> tuple[Tensor, Tensor]:
        """Labels `[pictures, labels, patches]`, and the symbolic tokens `[pictures, patches, width]` that say what they do."""
        raise NotImplementedError

    def match(self, batch: BatchT, hidden: Tensor) -> Tensor:
        """How far the projected features are from the symbolic tokens, as a share of the tokens' variance."""
        with torch.no_grad():
            labels, goal = self.goal(batch)
        weight = torch.where((labels > 0).any(1), 1.0, 0.3)[..., None]
        error = (self.projector(hidden[:, 1:]) - goal) ** 2
        return (error * weight).mean() / goal.var()

    def train_tower(self, stage: Stage, balance: Mapping[str, float] | None = None) -> None:
        """Tower alone, on the labels of the patches and what the CLS token must know."""

        def step(batch: BatchT, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, losses = self.look(batch)
            return weighed(losses, balance or {}), {**losses, **self.sight(batch, hidden)} if wanted else {}

        self.run(stage, ("tower", "heads"), [[self.tower, self.heads]], step)

    def train_bridge(self, stage: Stage, balance: Mapping[str, float] | None = None) -> None:
        """Projector (and, slowly, the tower): turn the tower's features into the symbolic tokens."""

        def step(batch: BatchT, wanted: bool) -> tuple[Tensor, Metrics]:
            hidden, losses = self.look(batch)
            match = self.match(batch, hidden)
            figures: Metrics = {"match": match, **self.sight(batch, hidden)} if wanted else {}
            return 4 * match + weighed(losses, balance or {}), figures

        self.run(stage, self.part_names, [[self.projector], [self.tower, self.heads]], step)
