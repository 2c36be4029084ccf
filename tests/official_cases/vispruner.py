"""Cases of VisPruner: tiles, each an image of the batch, and the score of a tower without CLS token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import CLIP, kept_per_image, make_batch, square_layout
from official_cases.hiprune import received_by_all
from official_cases.input_site import Tensors
from vlmprune.methods.input.vispruner import VisPruner, vispruner_order


def vispruner(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """What is chosen and in which order, or the received attention of whole maps."""
    if "attn" in inputs:
        return {"score": received_by_all(inputs["attn"])}
    attention, features = inputs["cls_attn"].transpose(1, 2), inputs["features"]
    tiles, tokens = features.shape[:2]
    method = VisPruner(keep=params["visual_token_num"], rho=float(params["important_ratio"]))
    signals = method.vision_signals(CLIP)
    vision = dict(zip(signals, (attention.flatten(0, 1), features.flatten(0, 1)), strict=True))
    batch = make_batch(method, [square_layout(tokens)] * tiles, features=features.flatten(0, 1), vision=vision)
    selected = vispruner_order(features, attention.mean(-1), params["important"], params["visual_token_num"])
    kept = torch.stack(kept_per_image(method.select(batch)))
    return {
        "important": selected[:, : params["important"]],
        "selected": selected,
        "mask": torch.zeros(tiles, tokens, dtype=torch.bool).scatter_(1, kept, True),
    }


RUNS = {"vispruner": vispruner}
