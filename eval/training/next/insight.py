"""Losses on a middle layer of the language model: where a named thing lies, and what is printed at a patch.

A crop does not show which place in a string its glyphs have when the string began in the crop before, or what glyph it is
that the edge cuts; the language model must put that together. Only training uses these heads.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..common.language import Answers
from ..common.scenes import LABEL_SIZES
from ..llava.tower import WIDTH

LAYER = 3
_PRINTED = (2, 3)
SPREAD = 3.5
"""Factor that gives places in a picture (0 to 1) about unit variance."""


class Insight(nn.Module):
    """Linear heads on the hidden states after `LAYER` layers."""

    def __init__(self) -> None:
        super().__init__()
        sizes = [*LABEL_SIZES.values()]
        self.sizes = [sizes[i] for i in _PRINTED]
        self.norm = nn.LayerNorm(WIDTH)
        self.printed = nn.Linear(WIDTH, sum(self.sizes))
        self.place = nn.Linear(WIDTH, 2)

    def forward(self, answers: Answers, labels: Tensor, places: Tensor) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """Losses and figures from `labels` (batch, labels, tokens) of the picture and `places` of the words."""
        hidden = self.norm(answers.hidden[LAYER])
        asked = hidden[:, answers.start :]
        place, wanted = self.place(asked), (places.flatten(1, 2) - 0.5) * SPREAD
        known = ~wanted.isnan().any(-1)
        losses = {"place": F.mse_loss(place[known], wanted[known])}
        seen = hidden[:, answers.start - labels.shape[-1] : answers.start]
        held = labels[:, 2] > 0
        figures = {}
        logits = self.printed(seen[held]).split(self.sizes, dim=-1)
        for name, guess, target in zip(("glyph", "order"), logits, (labels[:, i][held] for i in _PRINTED), strict=True):
            losses[f"llm_{name}"] = F.cross_entropy(guess, target)
            figures[f"llm_{name}"] = (guess.argmax(-1) == target).float().mean()
        return losses, figures | {"place": losses["place"]}
