"""Cases of the methods that select before the language model, fed to the project's own code."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from official_cases.batches import CLIP, kept_per_image, make_batch, square_layout
from torch import Tensor
from vlmprune.kernels.max_min import max_min_from_distances
from vlmprune.methods import DivPrune, FasterVLM
from vlmprune.methods.divprune import divprune_order
from vlmprune.methods.fastervlm import fastervlm_score
from vlmprune.methods.visual_batch import VisionSignal

Tensors = Mapping[str, Tensor]
Run = Callable[[Mapping[str, Any], Tensors], dict[str, Tensor]]


def fastervlm(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Each tile is one image of the batch."""
    attention = inputs["cls_attn"].transpose(1, 2)
    tiles, tokens = attention.shape[:2]
    method = FasterVLM(keep=params["visual_token_num"])
    vision = {VisionSignal("cls_attention", CLIP.feature_layer): attention.flatten(0, 1)}
    batch = make_batch(method, [square_layout(tokens)] * tiles, vision=vision)
    kept = torch.stack(kept_per_image(method.select(batch)))
    mask = torch.zeros(tiles, tokens, dtype=torch.bool).scatter_(1, kept, True)
    return {"keep_idx": kept, "mask": mask, "score": fastervlm_score(attention)}


def divprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One image, given by its features or by the distances among them."""
    if "distance" in inputs:
        order = max_min_from_distances(inputs["distance"], params["K"])
        return {"order": order, "indices_sorted": order.sort().values}
    features = inputs["features"]
    method = DivPrune(keep=params.get("ratio") or params["K"])
    batch = make_batch(method, [square_layout(len(features))], features=features)
    return {"order": divprune_order(batch), "indices_sorted": method.select(batch).kept}


RUNS: dict[str, Run] = {"fastervlm": fastervlm, "divprune": divprune}
