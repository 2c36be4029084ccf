"""Which tokens of a prompt stand for pictures and videos."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def visual_tokens(config: Any, input_ids: Tensor) -> Tensor:
    """Mask with the shape of `input_ids`: placeholders of images and, where the model has them, of videos."""
    ids = [getattr(config, name, None) for name in ("image_token_id", "video_token_id")]
    known = torch.tensor([token for token in ids if token is not None], device=input_ids.device)
    return torch.isin(input_ids, known)
