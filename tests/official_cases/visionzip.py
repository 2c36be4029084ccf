"""Cases of VisionZip: tiles, each an image of the batch; the tiles of one LLaVA-NeXT image; Qwen's form."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from official_cases.anyres import anyres_layout
from official_cases.batches import CLIP, make_batch, square_layout
from official_cases.input_site import Tensors, pair, per_token
from vlmprune.layout import VisualLayout, raster_layout
from vlmprune.methods.batch import TowerFacts, VisualBatch
from vlmprune.methods.input.visionzip import VisionZip
from vlmprune.methods.input.visionzip_plan import visionzip_plan

QWEN = TowerFacts(layers=32, feature_layer=31, has_cls=False)


def visionzip(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Tokens in the official order, which of them are whose, and the sequence of a LLaVA-NeXT image."""
    if "embeds" in inputs:
        return _qwen(params, inputs)
    hidden = inputs["hidden"]
    tiles, tokens = hidden.shape[0], hidden.shape[1] - 1
    kept = params["dominant"] + params["contextual"]
    method = VisionZip(keep=kept, contextual=params["contextual"] / kept, order="official")
    batch = _batch(method, [square_layout(tokens)] * tiles, inputs)
    selection = method.select(batch)
    assert selection.features is not None
    results = {"tokens": selection.features.view(tiles, kept, -1), **_roles(method, batch, params)}
    if "grid" in inputs:
        layout = anyres_layout(pair(inputs["grid"]), round(tokens**0.5), 1, 1, unpad=False, newlines=False)
        whole = replace(method, keep=kept * tiles)
        packed = whole.select(_batch(whole, [layout], inputs))
        assert packed.features is not None
        # Which of the tiles' own outputs each token of the sequence is, by its values.
        flat = results["tokens"].flatten(0, 1)
        same = (packed.features[:, None] - flat[None]).abs().amax(-1) < 1e-5
        number = same.int().argmax(1)
        results["packed"] = torch.stack([number // kept, number % kept], dim=1)
        assert (same.sum(1) == 1).all()
    return results


def _batch(method: VisionZip, layouts: list[VisualLayout], inputs: Tensors) -> VisualBatch:
    patches = {
        "cls_attention": inputs["cls_attn"].transpose(1, 2),
        "keys": inputs["metric"][:, 1:],
        "features": inputs["hidden"][:, 1:],
    }
    signals = {signal.kind: signal for signal in method.vision_signals(CLIP)}

    def packed(values: Tensor) -> Tensor:
        return values.flatten(0, 1) if len(layouts) > 1 or len(values) == 1 else per_token(values, layouts[0])

    cls_rows = inputs["hidden"][:, 0]
    return make_batch(
        method,
        layouts,
        features=packed(patches["features"]),
        vision={signals[kind]: packed(values) for kind, values in patches.items()},
        tile_vision={signals["cls_features"]: cls_rows.split(len(cls_rows) // len(layouts))},
        project=lambda rows: rows,
    )


def _roles(method: VisionZip, batch: VisualBatch, params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Dominant patches, targets, and the target of every merged patch, of each image of the batch."""
    selection = method.select(batch)
    assert selection.groups is not None
    images, total = len(batch.counts), batch.counts[0]
    plan = visionzip_plan(batch.layouts, batch.budgets, method.contextual, with_cls=True)
    dominant, pool = (tokens.view(images, -1) % total for tokens in method.split(batch, plan))
    target = pool.gather(1, plan.targets.view(images, -1))
    merged = torch.ones_like(pool, dtype=torch.bool).scatter_(1, plan.targets.view(images, -1), False)
    groups = selection.groups.view(images, -1).gather(1, pool)[merged].view(images, -1)
    return {"dominant_idx": dominant, "target_idx": target, "assign": groups - params["dominant"]}


def _qwen(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    total = params["n"]
    contextual = max(int(params["contextual_ratio"] * total), 1)
    kept = int(params["dominant_ratio"] * total) + contextual
    method = VisionZip(keep=kept, contextual=contextual / kept)
    attention, keys = method.vision_signals(QWEN)
    vision = {attention: inputs["score"][:, None], keys: inputs["key"]}
    batch = make_batch(method, [raster_layout(1, total)], features=inputs["embeds"], vision=vision, tower=QWEN)
    selection = method.select(batch)
    assert selection.features is not None
    plan = visionzip_plan(batch.layouts, batch.budgets, method.contextual, with_cls=False)
    _, pool = method.split(batch, plan)
    mask = torch.zeros(total, dtype=torch.bool).index_fill_(0, selection.kept, True)
    return {"keep_mask": mask, "out": selection.features, "target_idx": pool[plan.targets]}


RUNS = {"visionzip": visionzip}
