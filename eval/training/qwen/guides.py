"""Guides: what the language model's first layers are asked for beside the answers, so that it learns to look up and compare.

The attention of two heads of the second layer is to find what a shape's word names (as in tiny-llava, on symbolic tokens
only). Linear probes ask where things are: each visual token for its own row and column after the first layer, a shape's word
for the place of what it names after the second, and the second shape's word for the way to the first after the fourth.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from ..common.grounding import Grounding
from ..common.language import SLOT, WIDTH, Answers

UNIT = 12.0
"""Visual tokens that count as distance one."""
SPREAD = 0.08
"""About the variance of a place in a picture of 12 x 12 tokens; losses are shares of it."""
OWN, NAMED, WAY = 1, 2, 4
"""After how many layers each probe asks."""


class Guides(nn.Module):
    """Losses of the guides, by name."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__()
        self.grounding = Grounding(tokenizer, nothing=True)
        self.own, self.named, self.way = (nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2)) for _ in range(3))

    def forward(self, answers: Answers, size: tuple[int, int], ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """Losses for questions `ids` (batch, slots, `SLOT`) about tokens with `labels` (batch, labels, tokens)."""
        rows, columns = size
        tokens, start, flat = rows * columns, answers.start, ids.flatten(1)
        first = int((answers.position[1, 0] == answers.position[0, 0]).long().cumprod(0).sum()) - 1
        row, column = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
        place = torch.stack([row, column], dim=-1).flatten(0, 1) / UNIT
        own = (self.own(answers.hidden[OWN][:, first : first + tokens]) - place) ** 2
        named = self.grounding.named(flat, labels).float()
        number = named.sum(-1, keepdim=True)
        centre = named @ place / number.clamp(min=1)
        found = number[..., 0] > 0
        gone = (self.named(answers.hidden[NAMED][:, start:]) - centre) ** 2
        words = self.grounding.shape[flat].view(ids.shape) > 0
        pair = words.sum(-1) == 2
        places = centre.view(*ids.shape, 2)
        one = words.int().argmax(-1)
        two = SLOT - 1 - words.flip(-1).int().argmax(-1)
        pick = torch.stack([one, two], dim=-1)[..., None].expand(-1, -1, -1, 2)
        both = places.gather(2, pick)
        way = both[:, :, 0] - both[:, :, 1]
        late = answers.hidden[WAY][:, start:].view(*ids.shape, WIDTH)
        late = late.gather(2, two[..., None, None].expand(-1, -1, 1, WIDTH))[:, :, 0]
        off = (self.way(late[pair]) - way[pair]) ** 2
        return {"own": own.mean() / SPREAD, "named": gone[found].mean() / SPREAD, "way": off.mean() / (2 * SPREAD)}
