"""Cases of SCOPE: tiles, each an image of the batch; and the crops of one LLaVA-NeXT image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import normalize

from official_cases.anyres import anyres_layout
from official_cases.batches import CLIP, kept_per_image, make_batch, square_layout
from official_cases.input_site import Tensors, tile_and_token
from vlmprune.methods.input.scope import SCOPE


def scope(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Picks in order, kept tokens, and the sequence of a LLaVA-NeXT image."""
    if "tiles_wide" in params:
        return {"sequence": _sequence((params["tiles_high"], params["tiles_wide"]), inputs["selected_idx"])}
    features = inputs["features"]
    tiles, tokens, _ = features.shape
    alpha = float(params["alpha"]) if params["use_cls_attn"] else 0.0
    method = SCOPE(keep=params["K"], alpha=alpha, combined=params["combined"])
    vision = dict(zip(method.vision_signals(CLIP), _packed(inputs), strict=False))
    batch = make_batch(method, [square_layout(tokens)] * tiles, features=features.flatten(0, 1), vision=vision)
    unit = normalize(features.float(), dim=-1)
    return {
        "cosine": unit @ unit.transpose(1, 2),
        "selected_idx": method.order(batch).view(tiles, -1),
        "keep_idx": torch.stack(kept_per_image(method.select(batch))),
    }


def _packed(inputs: Tensors) -> list[Tensor]:
    attention = inputs.get("cls_attn")
    features = inputs["features"].flatten(0, 1).float()
    return [features] if attention is None else [features, attention.reshape(-1, 1).float()]


def _sequence(crops: tuple[int, int], selected: Tensor) -> Tensor:
    """The kept tokens of the crops in the order of the language model, `tile * 576 + patch`; attention chooses the given ones."""
    tiles, kept = selected.shape
    layout = anyres_layout(crops, 24, 1, 1, unpad=False, newlines=False)
    ids = tile_and_token(layout)
    salient = torch.zeros(tiles + 1, 576).index_fill_(1, torch.arange(kept), 1e6)
    salient[1:] = torch.zeros(tiles, 576).scatter_(1, selected, 1e6)
    method = SCOPE(keep=(tiles + 1) * kept, combined="add")
    features = torch.randn(layout.total, 8, generator=torch.Generator().manual_seed(0))
    vision = dict(zip(method.vision_signals(CLIP), (features, salient[ids[:, 0], ids[:, 1], None]), strict=True))
    tile, token = ids[method.select(make_batch(method, [layout], features=features, vision=vision)).kept].T
    return ((tile - 1) * 576 + token)[tile > 0]


RUNS = {"scope": scope}
