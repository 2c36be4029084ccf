"""Cases of TransPrune: the transitions of one layer, one stage with given transitions, and a whole language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

import vlmprune
from official_cases.injected_llava import InjectedLlava, cache_lengths
from official_cases.input_site import Tensors
from official_cases.layer_site import decoded_states, kept_columns, plain_layers, text_config, whole_model
from vlmprune.methods.batch import Selection
from vlmprune.methods.layer.transprune import TransPrune, transition_variation
from vlmprune.methods.layer_method import LayerBatch, LayerCut, LayerSignal


@dataclass(frozen=True, kw_only=True)
class OneStage(TransPrune):
    """One stage with a given count and given transitions, which notes the scores."""

    count: int = 1
    transitions: Tensor | None = None
    scores: list[Tensor] = field(default_factory=list)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        return (LayerCut(1, self.count),)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        assert self.transitions is not None
        given = {LayerSignal("mlp", 0): self.transitions[:, batch.columns[0]].sum(0)}
        batch = replace(batch, signals=given)
        self.scores.append(self.score(batch))
        return super().select_at_layer(batch)


def transprune_transitions(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """What attention and MLP of one layer do to every token."""
    attention, mlp = (
        transition_variation(inputs[f"{name}_in"], inputs[f"{name}_out"], None) for name in ("attn", "ffn")
    )
    return {"ttv_attn": attention, "ttv_ffn": mlp, "ttv": attention + mlp}


@torch.no_grad()
def transprune_stage(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One stage: a layer that passes its input on, then the layer whose weights the case gives."""
    hidden, start, current = inputs["hidden"], params["image_start"], params["current"]
    length = hidden.shape[1]
    weights = plain_layers(hidden.shape[-1], 2)
    for name, key in (("input_layernorm", "ln"), ("self_attn.q_proj", "q"), ("self_attn.k_proj", "k")):
        weights[f"layers.1.{name}.weight"] = inputs[f"{key}_weight"]
    mask = torch.ones(1, length, dtype=torch.int64)
    llava = InjectedLlava(hidden, mask, [(start, current)], text_config(params, layers=2, ffn=8), weights)
    count = int(params["N0"] * params["ratios"][params["stage"] + 1])
    method = OneStage(layers=(1,), ratios=(1.0,), count=count, transitions=inputs["ttv_layers"])
    vlmprune.apply(llava.model, method)
    llava.watch()
    llava.model(**llava.inputs, position_ids=inputs["position_ids"])
    seen = llava.take_seen()[1]
    (image,) = vlmprune.last_run(llava.model).images
    left = torch.cat([torch.arange(start), start + image.kept, torch.arange(start + current, length)])
    return {
        "keep_idx": start + image.kept,
        "out_hidden": seen["hidden"],
        "out_position_ids": seen["positions"],
        "scores": method.scores[0],
        "ttv_layers_after": inputs["ttv_layers"][:, left],
    }


@torch.no_grad()
def transprune_model(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Prefill and decode of a whole language model."""
    total, start = params["N0"], params["image_start"]
    length = start + total + params["text_after"]
    llava = whole_model(params, inputs, (start, total))
    method = TransPrune(
        layers=tuple(params["pruning"]),
        ratios=tuple(params["ratios"][1:]),
        accumulate=tuple(layer - 1 for layer in params["accumulating"]),
    )
    vlmprune.apply(llava.model, method)
    output = llava.model.model(**llava.inputs, use_cache=True)
    cache = output.past_key_values
    (image,) = vlmprune.last_run(llava.model).images
    stages = [kept for layer, kept in image.stages if layer]
    results = {
        "keep_orig": torch.stack([pad(kept, (0, total - len(kept)), value=-1) for kept in stages]),
        "kv_len_prefill": cache_lengths(cache),
        "prefill_out": kept_columns(output.last_hidden_state, start, total, stages[-1]),
    }
    llava.watch()
    return {**results, "decode_out": decoded_states(llava, cache, length)}


def transprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of one of the three kinds."""
    if "attn_in" in inputs:
        return transprune_transitions(params, inputs)
    return (transprune_stage if "hidden" in inputs else transprune_model)(params, inputs)


RUNS = {"transprune": transprune}
