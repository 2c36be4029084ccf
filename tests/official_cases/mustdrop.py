"""Cases of MustDrop: windows merged in the tower, protected tokens, the filter, and a whole language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import vlmprune
from official_cases.injected_llava import cache_lengths
from official_cases.input_site import Tensors
from official_cases.layer_site import decoded_states, kept_columns, whole_model
from vlmprune.methods.batch import TowerFacts, VisionSignal
from vlmprune.methods.encoder.mustdrop import MustDrop, window_likeness
from vlmprune.methods.encoder_method import BlockBatch
from vlmprune.methods.layer.mustdrop_filter import FilterScores, MustDropFilter, important, key_set
from vlmprune.methods.layer_method import LayerBatch


@dataclass(frozen=True, kw_only=True)
class GivenKeys(MustDropFilter):
    """The filter with given protected tokens."""

    keys: Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        return ()

    def key_tokens(self, batch: LayerBatch, image: int) -> Tensor:
        return self.keys


def mustdrop_merge(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """All tiles of a batch, CLS token first."""
    method = MustDrop(window=tuple(params["window"]), merge_threshold=params["threshold"], faithful=True)
    tower = TowerFacts(layers=24, feature_layer=22, has_cls=True)
    batch = BlockBatch(block=0, hidden=inputs["hidden"], remove=0, tower=tower, leading=1)
    removed = method.removed(batch)
    assert removed is not None
    batch = BlockBatch(block=0, hidden=inputs["hidden"], remove=min(removed), tower=tower, leading=1)
    reduction = method.reduce(batch)
    assert reduction.sizes is not None
    return {
        "out": reduction.values,
        "size": reduction.sizes[..., None],
        "window_sim": window_likeness(inputs["hidden"][:, 1:], method.window),
    }


def mustdrop_keys(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Attention of the CLS tokens of several tiles, over themselves and the patches."""
    scores = inputs["cls_attn"][:, :, 1:].mean(1)
    return {"key_set": torch.stack([key_set(row, params["rate"]) for row in scores])}


def mustdrop_filter(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One filter, from the attention of every word."""
    start, total = params["image_start"], params["N"]
    attention = inputs["attn_text_rows"].mean(0)[:, start : start + total]
    scores = FilterScores(attention.sum(0), attention.amax(0))
    stays = important(scores, params["global_thr"], params["individual_thr"])
    union = stays.index_fill(0, inputs["key_set"], True)
    kept = union.nonzero().flatten()
    return {
        "global_score": scores.everything,
        "max_score": scores.highest,
        "important": stays.nonzero().flatten(),
        "keep_idx": kept,
        "new_key_set": torch.isin(kept, inputs["key_set"]).nonzero().flatten(),
    }


@torch.no_grad()
def mustdrop_model(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Prefill and decode of a whole language model, positions as in the official code."""
    total, start = params["N"], params["image_start"]
    length = start + total + params["text_after"]
    llava = whole_model(params, inputs, (start, total))
    method = GivenKeys(
        layers=tuple(params["pruning_layers"]),
        global_threshold=params["global_thr"],
        individual_threshold=params["individual_thr"],
        faithful=True,
        keys=inputs["key_set"],
    )
    vlmprune.apply(llava.model, method, positions="compact")
    output = llava.model.model(**llava.inputs, use_cache=True)
    cache = output.past_key_values
    (image,) = vlmprune.last_run(llava.model).images
    results = {
        "kv_len_prefill": cache_lengths(cache),
        "prefill_out": kept_columns(output.last_hidden_state, start, total, image.kept),
    }
    llava.watch()
    return {**results, "decode_out": decoded_states(llava, cache, length)}


def mustdrop(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of one of the four kinds."""
    for name, run in (("hidden", mustdrop_merge), ("cls_attn", mustdrop_keys), ("attn_text_rows", mustdrop_filter)):
        if name in inputs:
            return run(params, inputs)
    return mustdrop_model(params, inputs)


RUNS = {"mustdrop": mustdrop}
