"""Cases of both stages of ToDRE."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import CLIP, kept_per_image, make_batch, square_layout, stacked
from official_cases.input_site import Tensors
from vlmprune.layout import unknown_layout
from vlmprune.methods.batch import VisionSignal
from vlmprune.methods.input.todre import ToDRE
from vlmprune.methods.layer.todre_relevance import SYSTEM, TEXT, VISUAL, ToDRERelevance, relevance_shares
from vlmprune.methods.layer_method import LayerBatch, ProbedLayer


def todre_diversity(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Features `[N, dim]` of one image or `[images, N, dim]`; with attention for fewer tokens, these are the thumbnail."""
    features = inputs["features"]
    batched = features.ndim == 3
    images, total = (len(features) if batched else 1), features.shape[-2]
    attention = inputs["cls_attention"].reshape(images, -1)
    thumbnail = attention.shape[1]
    layout = square_layout(total)
    if total > thumbnail:
        tile = (torch.arange(total) >= thumbnail).long()
        layout = replace(unknown_layout(total), tile=tile, crops=(1, 1))
    method = ToDRE(keep=params["K"], variant="kcenter" if params["variant"] == "kcenter" else "max_sum")
    # The crops are scored too in a model; the highest of all lies there and must not become the pivot.
    scores = torch.full((images, total), float(attention.max()) + 1)
    scores[:, :thumbnail] = attention
    vision = {VisionSignal("cls_attention", CLIP.layers - 1): scores.view(-1, 1)}
    batch = make_batch(method, [layout] * images, features=features.view(images * total, -1), vision=vision)
    return {
        "order": stacked(method.order(batch).split(list(batch.budgets)), batched),
        "indices_sorted": stacked(kept_per_image(method.select(batch)), batched),
    }


def todre_relevance(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One row, given by the attention of the probed layer: queries and keys are made that give just this attention."""
    attention = inputs["attn"]
    heads, tokens = attention.shape[:2]
    kinds = torch.zeros(1, tokens, dtype=torch.int8)
    for name, kind in (("system_idx", SYSTEM), ("visual_idx", VISUAL), ("text_idx", TEXT)):
        kinds[0, inputs[name]] = kind
    query = attention.clamp(min=torch.finfo(torch.float32).tiny).log().transpose(0, 1)[None]
    key = torch.eye(tokens)[None, :, None].expand(1, tokens, heads, tokens)
    probed = ProbedLayer(query=query, key=key, kinds=kinds, scale=1.0)
    text_to_visual, visual_to_text = relevance_shares(probed)
    visual = inputs["visual_idx"]
    method = ToDRERelevance(layer=1, tau=params["tau"])
    batch = LayerBatch(layer=1, counts=(len(visual),), budgets=(None,), rows=(0,), probed=probed)
    kept = visual[method.select_at_layer(batch).kept]
    positions = torch.cat([inputs["system_idx"], kept, inputs["text_idx"]]).sort().values
    return {"alpha_tv": text_to_visual, "alpha_vt": visual_to_text, "kept_positions": positions}


def todre(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of either stage."""
    return (todre_diversity if params["stage"] == 1 else todre_relevance)(params, inputs)


RUNS = {"todre": todre}
