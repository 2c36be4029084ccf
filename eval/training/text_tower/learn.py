"""The contrastive training: texts against whole pictures, and against patches."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPModel, PreTrainedTokenizerFast

from .asked import ask_or_name, asked_patches
from .pair import text_ids
from .pictures import SeenPictures

FOUND_WEIGHT = 3.0


@dataclass(frozen=True)
class Lesson:
    """How long and on what: `steps` of `tiles` tiles with `texts` questions about each, `patches` patches of a tile."""

    steps: int = 1500
    tiles: int = 16
    texts: int = 3
    patches: int = 96
    rate: float = 3e-3
    seed: int = 0


def picture_loss(similarity: Tensor, shown: Tensor) -> Tensor:
    """CLIP's loss both ways, where several texts fit a picture and several pictures a text.

    Args:
        similarity: scaled cosines `[tiles, texts]`.
        shown: whether the tile shows what the text names, bool of the same shape.
    """
    losses = []
    for direction in (0, 1):
        wanted = shown.float()
        count = wanted.sum(direction)
        each = -(similarity.log_softmax(direction) * wanted).sum(direction) / count.clamp(min=1)
        losses.append(each[count > 0].mean())
    return torch.stack(losses).mean()


def learn(
    model: CLIPModel,
    tokenizer: PreTrainedTokenizerFast,
    seen: SeenPictures,
    lesson: Lesson,
    on_step: Callable[[int, float, float], None] | None = None,
) -> float:
    """Train the text tower and both projections; returns the seconds it took.

    A patch is compared as the methods do it: layers of `seen` through the tower's last norm and the picture's projection;
    the loss is that of SigLIP, of pairs on their own.
    """
    torch.manual_seed(lesson.seed)
    rng, start = np.random.default_rng(lesson.seed), time.perf_counter()
    sharpness, lean = nn.Parameter(torch.tensor(10.0).log()), nn.Parameter(torch.tensor(-2.0))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW([*trained, sharpness, lean], weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lesson.rate, total_steps=lesson.steps)
    for step in range(lesson.steps):
        picked = torch.from_numpy(rng.integers(0, len(seen.labels), lesson.tiles))
        labels = seen.labels[picked]
        asked = [ask_or_name(seen.scenes[tile], rng) for tile in picked.tolist() for _ in range(lesson.texts)]
        found, shown = (
            torch.stack(part, 1) for part in zip(*(asked_patches(text, labels) for text in asked), strict=True)
        )
        texts = F.normalize(model.get_text_features(text_ids(tokenizer, asked)).pooler_output, dim=-1)
        states = model.vision_model.post_layernorm(seen.states[picked].float())
        pictures = F.normalize(model.visual_projection(states[:, 1, 0]), dim=-1)
        whole = picture_loss(pictures @ texts.T * model.logit_scale.exp(), shown)
        # Patches that show something, and a few of the background.
        holding = (labels[:, 0] + labels[:, 2] > 0).float() + 0.15
        places = torch.multinomial(holding, min(lesson.patches, holding.shape[1]))
        states = states[:, :, 1:].gather(2, places[:, None, :, None].expand(-1, 2, -1, states.shape[-1]))
        patches = F.normalize(model.visual_projection(states), dim=-1)
        scores = torch.einsum("blpd,td->bltp", patches, texts) * sharpness.exp() + lean
        wanted = found.gather(2, places[:, None].expand(-1, len(asked), -1))[:, None].expand_as(scores)
        parts = F.binary_cross_entropy_with_logits(scores, wanted.float(), pos_weight=torch.tensor(FOUND_WEIGHT))
        optimizer.zero_grad()
        (whole + parts).backward()
        optimizer.step()
        schedule.step()
        if on_step is not None:
            on_step(step + 1, whole.item(), parts.item())
    return time.perf_counter() - start
