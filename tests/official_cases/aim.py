"""Cases of AIM: its merging, its votes, one step of its schedule, and a whole language model."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

import vlmprune
from official_cases.injected_llava import cache_lengths
from official_cases.input_site import Tensors
from official_cases.layer_site import decoded_states, kept_columns, whole_model
from vlmprune.methods.input.aim import AIM
from vlmprune.methods.input.aim_rounds import merge_rounds, plan_round
from vlmprune.methods.layer.aim_pagerank import aim_keep, pagerank_importance


def aim_merge(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Rounds that remove given numbers of the tokens of every image."""
    batch, tokens, dim = inputs["x"].shape
    results, rounds, left = {}, [], tokens
    for number, wanted in enumerate(params["r"], 1):
        removed = max(0, min(wanted, left // 2))
        rounds.append(plan_round([left] * batch, [removed] * batch))
        left -= removed
        merged = merge_rounds(inputs["x"].flatten(0, 1), rounds)
        results[f"out{number}"] = merged.values.view(batch, left, dim)
    return results


def aim_votes(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """The importance of every token of rows of one length."""
    query, key = (inputs[name].transpose(1, 2) for name in ("q", "k"))
    rows, tokens, _, width = query.shape
    importance = pagerank_importance(
        query.flatten(0, 1),
        key.flatten(0, 1),
        range(0, rows * tokens + 1, tokens),
        width**-0.5 / params["tau"],
        params["iters"],
    )
    return {"importance": importance.view(rows, tokens)}


def aim_step(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """What is left of the visual tokens after one layer."""
    start, end, _ = params["boundaries"]
    mask = inputs["mask_before"].clone()
    alive = start + mask[0, start:end].nonzero().flatten()
    count = min(len(alive), int((end - start) * params["retain_rate"]))
    kept = alive[aim_keep(inputs["importance"][0, alive], (0, len(alive)), (count,))]
    mask[0, start:end] = 0
    mask[0, kept] = 1
    return {"alive_visual": kept, "mask_after": mask}


@torch.no_grad()
def aim_model(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Prefill and decode of a whole language model that masks, as the official code does."""
    start, end, length = params["boundaries"]
    rates = params["retain_rate"]
    first = rates.index(next(rate for rate in rates if rate < 1))
    steps = round(1 / (1 - rates[first])) if rates[first] else 1
    llava = whole_model(params, inputs, (start, end - start))
    method = AIM(merge_rounds=0, layers=(first, first + steps), faithful=True)
    vlmprune.apply(llava.model, method)
    output = llava.model.model(**llava.inputs, use_cache=True)
    cache = output.past_key_values
    assert cache_lengths(cache).tolist() == [length] * params["layers"]
    (image,) = vlmprune.last_run(llava.model).images
    masks = torch.ones(params["layers"], length, dtype=torch.int64)
    for layer in range(params["layers"]):
        alive = [kept for since, kept in image.stages if since <= layer][-1]
        masks[layer, start:end] = 0
        masks[layer, start + alive] = 1
    llava.watch()
    return {
        "decode_out": decoded_states(llava, cache, length),
        "layer_masks": masks,
        "text_out": kept_columns(output.last_hidden_state, start, end - start, torch.zeros(0, dtype=torch.int64))[0],
    }


def aim(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of one of the four kinds."""
    for name, run in (("x", aim_merge), ("q", aim_votes), ("importance", aim_step)):
        if name in inputs:
            return run(params, inputs)
    return aim_model(params, inputs)


RUNS = {"aim": aim}
