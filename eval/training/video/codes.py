"""The code of visual tokens, read off the shipped tiny-qwen2.5-vl: a vector for each label, and how far tokens are from it."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor
from transformers import Qwen2_5_VLForConditionalGeneration

from ..qwen.batches import SizedPlan
from ..qwen.batches import make_batch as make_pictures
from ..qwen.codes import KINDS, one_hot
from ..qwen.tokenizer import VisionPrompts
from ..qwen.tower import look

SEED = 12_000_000
PLAN = SizedPlan(1600, ((6, 6), (5, 5), (8, 8)), things=(10, 14))


@torch.no_grad()
def fit_codes(model: Qwen2_5_VLForConditionalGeneration, prompts: VisionPrompts, batches: int = 12) -> Tensor:
    """Codes (sum of `KINDS` and one row more, width) by least squares; the last row is the residuals' deviation."""
    size = sum(KINDS)
    known, found = [], []
    for number in range(batches):
        batch = make_pictures(PLAN, prompts, np.random.default_rng([SEED, number]))
        _, tokens = look(model.model.visual, batch.pixels, batch.size)
        known.append(one_hot(batch.tokens.transpose(1, 2)).flatten(0, 1))
        found.append(tokens.flatten(0, 1))
    labels, features = torch.cat(known), torch.cat(found)
    codes = torch.linalg.solve(labels.T @ labels + 1e-2 * torch.eye(size), labels.T @ features)
    rest = (features - labels @ codes).std(0, keepdim=True)
    return torch.cat([codes, rest])
