"""Cases of CDPruner: the tiles of one image, by visual tokens and CLIP embeddings."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import make_batch
from official_cases.input_site import Tensors
from vlmprune.layout import unknown_layout
from vlmprune.methods.input.cdpruner import CDPruner, cdpruner_order, contrastive_relevance, scaled_relevance


def cdpruner(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Relevance over all tiles together, and the picks of each."""
    features = inputs["features"]
    tiles, tokens, _ = features.shape
    tile = torch.arange(tiles).repeat_interleave(tokens)
    layout = replace(unknown_layout(tiles * tokens), tile=tile, crops=(1, tiles - 1) if tiles > 1 else None)
    method = CDPruner(keep=params["K"] * tiles, relevance="instruction")
    batch = make_batch(method, [layout], features=features.flatten(0, 1))
    embeddings = inputs["image_embeds"].flatten(0, 1)
    relevance = scaled_relevance(contrastive_relevance(embeddings, inputs["text_embeds"]))
    order = cdpruner_order(batch, relevance).view(tiles, -1)
    return {
        "relevance": relevance.view(tiles, tokens),
        "order": order,
        "indices_sorted": order.sort(dim=1).values,
        "mask": torch.zeros(tiles, tokens, dtype=torch.bool).scatter_(1, order, True),
    }


RUNS = {"cdpruner": cdpruner}
