"""Cases of TextMonkey's filter: the images of a case as one batch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import kept_per_image, make_batch, square_layout
from official_cases.input_site import Tensors
from vlmprune.methods.input.textmonkey import TextMonkey, textmonkey_score


def textmonkey(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Scores, kept tokens and their values."""
    images, tokens, _ = inputs["x"].shape
    method = TextMonkey(keep=params["r"])
    batch = make_batch(method, [square_layout(tokens)] * images, features=inputs["x"].flatten(0, 1))
    kept = torch.stack(kept_per_image(method.select(batch)))
    return {
        "kept_idx": kept,
        "score": textmonkey_score(batch.features, batch.offsets).view(images, tokens),
        "x_out": inputs["x"].gather(1, kept[..., None].expand(-1, -1, params["D"])),
    }


RUNS = {"textmonkey": textmonkey}
