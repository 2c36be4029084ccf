"""Guides: what the language model's first layers are asked about a clip beside the answers, so that it learns to compare moments.

Linear probes ask visual tokens what they know of time. The attention of two heads of the third layer is to look from what a
token shows to the same thing in the first moment, from which it is seen whether it was there and where (on symbolic tokens only).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

from ..common.language import WIDTH, Answers
from ..common.losses import label_accuracy, label_loss
from .clips import MOMENTS
from .labels import EVENTS, RANKS

OWN, WAY, EVENT, RANK = 1, 3, 4, 4
"""After how many layers each probe asks."""
SPREAD = 0.02
"""About the variance of a way; its loss is a share of it."""
LOOK, HEADS = 2, 2
"""The layer whose first heads are to look back."""


class ClipGuides(nn.Module):
    """Losses of the guides, by name: each token's own moment, the way of what it shows, its event and rank."""

    def __init__(self) -> None:
        super().__init__()
        self.own = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, MOMENTS[1]))
        self.way = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, 2))
        self.event = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, len(EVENTS)))
        self.rank = nn.Sequential(nn.RMSNorm(WIDTH), nn.Linear(WIDTH, RANKS))

    def forward(
        self, answers: Answers, first: int, moments: int, events: Tensor, ranks: Tensor, ways: Tensor
    ) -> tuple[dict[str, Tensor], dict[str, float]]:
        """Losses and shares of right labels for clips whose tokens begin at `first`; labels are (batch, moments * tokens)."""
        tokens = events.shape[1]
        at = slice(first, first + tokens)
        own = torch.arange(moments).repeat_interleave(tokens // moments).expand(len(events), -1)
        event, rank = self.event(answers.hidden[EVENT][:, at]), self.rank(answers.hidden[RANK][:, at])
        way = (self.way(answers.hidden[WAY][:, at]).float() - ways) ** 2
        losses = {
            "way": way[events > 0].mean() / SPREAD,
            "own": nn.functional.cross_entropy(self.own(answers.hidden[OWN][:, at]).flatten(0, 1), own.flatten()),
            "event": label_loss(event, events),
            "rank": label_loss(rank, ranks),
        }
        return losses, {"acc_event": label_accuracy(event, events), "acc_rank": label_accuracy(rank, ranks)}


def looking_back(language: Qwen2_5_VLTextModel, answers: Answers, first: int, moments: int, shapes: Tensor) -> Tensor:
    """Mean of -log(attention paid to the same shape in the first moment), over tokens of later moments that show a shape.

    Where the first moment does not show the shape, attention is to go to the tokens in front of the clip. `shapes` is
    (batch, moments * tokens), 0 where there is none; the clip's tokens begin at `first`.
    """
    layer, hidden = language.layers[LOOK], answers.hidden[LOOK]
    normed, attention = layer.input_layernorm(hidden), layer.self_attn
    query, key = (
        project(normed).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        for project in (attention.q_proj, attention.k_proj)
    )
    query, key = apply_rotary_pos_emb(query, key, *language.rotary_emb(hidden, answers.position))
    tokens = shapes.shape[1]
    start = tokens // moments
    seen = torch.arange(first + tokens)[None] <= torch.arange(first + start, first + tokens)[:, None]
    scores = query[:, :HEADS, first + start : first + tokens] @ key[:, :HEADS, : first + tokens].transpose(-1, -2)
    share = (scores.float() * attention.scaling).masked_fill(~seen, -torch.inf).log_softmax(-1)
    later = shapes[:, start:]
    same = (later[:, :, None] == shapes[:, None, :start]) & (later > 0)[:, :, None]
    nothing = (~same.any(-1) & (later > 0))[..., None].expand(-1, -1, first)
    target = torch.zeros(len(shapes), tokens - start, first + tokens, dtype=torch.bool)
    target[:, :, :first] = nothing
    target[:, :, first : first + start] = same
    caught = share.masked_fill(~target[:, None], -torch.inf).logsumexp(-1)
    loss: Tensor = -caught.transpose(1, 2)[later > 0].mean()
    return loss
