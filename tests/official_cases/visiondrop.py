"""Cases of VisionDrop: the tower's stage, one stage of the language model, and whole language models."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vlmprune
from official_cases.batches import CLIP, make_batch, square_layout
from official_cases.injected_llava import InjectedLlava
from official_cases.input_site import Tensors
from official_cases.layer_site import plain_layers, text_config, watched_run, whole_model
from vlmprune.layout import raster_layout
from vlmprune.methods import VisionDropStages, VisionZip
from vlmprune.methods.batch import Selection
from vlmprune.methods.input.visionzip_plan import visionzip_plan
from vlmprune.methods.layer_method import LayerBatch


@dataclass(frozen=True, kw_only=True)
class NotingStages(VisionDropStages):
    """The stages, with the batches that they saw and what they answered."""

    seen: list[tuple[LayerBatch, tuple[Tensor, ...], Selection]] = field(default_factory=list)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        selection = super().select_at_layer(batch)
        self.seen.append((batch, self.scores(batch), selection))
        return selection


def visiondrop_tower(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Tiles of a tower, each an image: attention of the CLS token, keys and states, the CLS token first."""
    hidden, keys = inputs["hidden"], inputs["keys"]
    tiles, tokens = hidden.shape[0], hidden.shape[1] - 1
    kept = params["dominant"] + params["contextual"]
    # `VisionDrop` itself would let half as many again as `keep` enter.
    method = VisionZip(keep=kept, contextual=params["contextual"] / kept, order="official")
    square = round(tokens**0.5) ** 2 == tokens
    layouts = [square_layout(tokens) if square else raster_layout(1, tokens)] * tiles
    signals = {signal.kind: signal for signal in method.vision_signals(CLIP)}
    heads = CLIP.heads
    vision = {
        "cls_attention": inputs["cls_attn"][:, :, 1:].transpose(1, 2),
        # The mean over the case's heads, as that many equal heads as the tower has.
        "keys": keys[:, :, 1:].mean(1).repeat(1, 1, heads),
        "features": hidden[:, 1:],
    }
    batch = make_batch(
        method,
        layouts,
        features=hidden[:, 1:].flatten(0, 1),
        vision={signals[kind]: values.flatten(0, 1) for kind, values in vision.items()},
        tile_vision={signals["cls_features"]: hidden[:, 0].split(1)},
        project=lambda rows: rows,
    )
    selection = method.select(batch)
    assert selection.features is not None
    plan = visionzip_plan(batch.layouts, batch.budgets, method.contextual, with_cls=True)
    dominant, _ = method.split(batch, plan)
    patches = 1 + dominant.view(tiles, -1) % tokens
    return {
        "out": selection.features.view(tiles, kept, -1),
        "dominant_idx": torch.cat([torch.zeros(tiles, 1, dtype=torch.int64), patches], 1),
    }


@torch.no_grad()
def visiondrop_stage(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One stage: a layer that passes its input on, then the layer whose weights the case gives."""
    hidden, start, total = inputs["hidden"], params["image_start"], params["current"]
    weights = plain_layers(hidden.shape[-1], 2)
    for name, key in (
        ("input_layernorm", "ln_weight"),
        ("self_attn.q_proj", "q_weight"),
        ("self_attn.k_proj", "k_weight"),
    ):
        weights[f"layers.1.{name}.weight"] = inputs[key]
    mask = torch.ones(hidden.shape[:2], dtype=torch.int64)
    llava = InjectedLlava(hidden, mask, [(start, total)], text_config(params, layers=2, ffn=8), weights)
    method = NotingStages(layers=(1,), counts=((params["dominant"], params["contextual"]),))
    vlmprune.apply(llava.model, method)
    llava.watch()
    llava.model(**llava.inputs, position_ids=inputs["position_ids"])
    entered = llava.take_seen()[1]
    ((_, (scores,), selection),) = method.seen
    left = selection.counts[0]
    return {
        "scores": scores,
        "dominant_idx": start + selection.kept[: params["dominant"]],
        "visual_out": entered["hidden"][0, start : start + left],
        "out_hidden": entered["hidden"],
        "out_position_ids": entered["positions"],
    }


@torch.no_grad()
def visiondrop_model(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Prefill and decode of a whole language model, whose visual tokens the tower's stage has left."""
    total, start = sum(params["counts"][0]), params["image_start"]
    length = start + total + params["text_after"]
    llava = whole_model(params, inputs, (start, total))
    counts = tuple((dominant, contextual) for dominant, contextual in params["counts"][1:])
    vlmprune.apply(llava.model, VisionDropStages(layers=tuple(params["layer_list"]), counts=counts))
    return watched_run(llava, length)


def visiondrop(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of any kind."""
    if "decode_embeds" in inputs:
        return visiondrop_model(params, inputs)
    return (visiondrop_tower if "cls_attn" in inputs else visiondrop_stage)(params, inputs)


RUNS = {"visiondrop": visiondrop}
