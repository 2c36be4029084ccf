"""Cases of the methods that drop inside the language model, run through the engine on a model made of the case's weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad
from torch.nn.utils.rnn import pad_sequence
from transformers import Qwen2_5_VLTextConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLAttention

import vlmprune
from official_cases.injected_llava import InjectedLlava, cache_lengths
from official_cases.input_site import Tensors
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods import FastV, PyramidDrop
from vlmprune.methods.batch import Selection
from vlmprune.methods.layer.fastv import fastv_count, fastv_keep
from vlmprune.methods.layer.pyramiddrop import pyramiddrop_keep
from vlmprune.methods.layer_method import LayerBatch, LayerCut
from vlmprune.methods.staged_method import stage_counts
from vlmprune.patches.rotation import rotate


@dataclass(frozen=True, kw_only=True)
class OneStage(PyramidDrop):
    """One stage of PyramidDrop with the given counts, which notes the scores."""

    counts: dict[int, int] = field(default_factory=dict)
    batches: list[LayerBatch] = field(default_factory=list)

    def schedule(self, total: int, layers: int) -> tuple[LayerCut, ...]:
        return (LayerCut(1, self.counts[total]),)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        self.batches.append(batch)
        return super().select_at_layer(batch)


@dataclass(frozen=True, kw_only=True)
class NotingFastV(FastV):
    """FastV that notes the scores."""

    batches: list[LayerBatch] = field(default_factory=list)

    def select_at_layer(self, batch: LayerBatch) -> Selection:
        self.batches.append(batch)
        return super().select_at_layer(batch)


@torch.no_grad()
def pyramiddrop_stage(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One stage: a layer that passes its input on, then the layer whose weights the case gives."""
    hidden, mask, starts = inputs["hidden"], inputs["attention_mask"], inputs["image_start"].tolist()
    stage, ratios, totals = params["stage"], params["ratios"], inputs["image_tokens0"].tolist()
    current = [
        stage_counts(total, ratios)[stage] if start >= 0 else 0 for total, start in zip(totals, starts, strict=True)
    ]
    left = [stage_counts(total, ratios)[stage + 1] for total in totals]
    spans = [None if start < 0 else (start, count) for start, count in zip(starts, current, strict=True)]
    dim = hidden.shape[-1]
    weights = plain_layers(dim, 2)
    for name, key in (
        ("input_layernorm", "ln_weight"),
        ("self_attn.q_proj", "q_weight"),
        ("self_attn.k_proj", "k_weight"),
    ):
        weights[f"layers.1.{name}.weight"] = inputs[key]
    llava = InjectedLlava(hidden, mask, spans, text_config(params, layers=2, ffn=8), weights)
    method = OneStage(layers=(1,), ratios=(1.0,), counts=dict(zip(current, left, strict=True)))
    vlmprune.apply(llava.model, method)
    llava.watch()
    llava.model(**llava.inputs, position_ids=inputs["position_ids"])
    seen = llava.take_seen()[1]
    images = vlmprune.last_run(llava.model).images
    lengths = mask.sum(1).tolist()
    for image in images:
        lengths[image.batch_index] += len(image.kept) - image.total
    longest = max(lengths)

    def right_padded(values: Tensor) -> Tensor:
        rows = [pad_row[len(pad_row) - length :] for pad_row, length in zip(values, lengths, strict=True)]
        if values.shape[1] == mask.shape[1] and longest == mask.shape[1]:
            rows = [values[row, mask[row].bool()] for row in range(len(values))]
        return pad_sequence(rows, batch_first=True)

    kept = [torch.full((0,), -1)] * len(mask)
    for image in images:
        kept[image.batch_index] = starts[image.batch_index] + image.kept
    if not method.batches:
        method = _scored_once(llava, method, inputs)
    scores = [torch.full((0,), -1.0)] * len(mask)
    for batch in method.batches:
        assert batch.attention is not None
        for row, values in zip(batch.rows, batch.attention.split(list(batch.counts)), strict=True):
            scores[row] = values
    positions = seen["positions"].expand(len(mask), -1)
    return {
        "keep_idx": _padded(kept),
        "out_hidden": right_padded(seen["hidden"]),
        "out_position_ids": right_padded(positions),
        "out_attention_mask": right_padded(torch.ones_like(positions)),
        "scores": _padded(scores),
    }


def _scored_once(llava: InjectedLlava, method: OneStage, inputs: Tensors) -> OneStage:
    # A stage that keeps everything is not scored; with one token less it is.
    vlmprune.remove(llava.model)
    fewer = OneStage(layers=(1,), ratios=(1.0,), counts={count: count - 1 for count in method.counts})
    with vlmprune.pruned(llava.model, fewer):
        llava.model(**llava.inputs, position_ids=inputs["position_ids"])
    return fewer


@torch.no_grad()
def pyramiddrop_model(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Prefill and decode of a whole language model."""
    total, start, length = params["N0"], params["image_start"], params["full_len"]
    llava = whole_model(params, inputs, (start, total))
    method = PyramidDrop(layers=tuple(params["layer_list"]), ratios=tuple(params["ratios"][1:]))
    vlmprune.apply(llava.model, method)
    llava.watch()
    output = llava.model.model(**llava.inputs, use_cache=True)
    seen, cache = llava.take_seen(), output.past_key_values
    (image,) = vlmprune.last_run(llava.model).images
    stages = [kept for layer, kept in image.stages if layer]
    steps, keys = [], cache.layers[-1].keys.clone()
    results = {
        "keep_orig": torch.stack([pad(kept, (0, total - len(kept)), value=-1) for kept in stages]),
        "kv_len_prefill": cache_lengths(cache),
        "k0_keys": keys,
        "prefill_out": kept_columns(output.last_hidden_state, start, total, stages[-1]),
        "pos_prefill_last": torch.stack([layer["positions"].flatten()[-1] for layer in seen]),
    }
    for step in range(params["decode_steps"]):
        steps.append(decode_step(llava, cache, length + step, step))
    results["decode_out"] = torch.stack([hidden for hidden, _, _ in steps])
    results["pos_decode"] = torch.stack([positions for _, positions, _ in steps])
    results["kv_len_decode"] = torch.stack([lengths for _, _, lengths in steps])
    return results


@torch.no_grad()
def pyramiddrop_grouped(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Grouped queries and M-RoPE, from projected queries and keys, with the functions that the engine calls."""
    heads, head_dim = params["heads"], params["head_dim"]
    attention = Qwen2_5_VLAttention(
        Qwen2_5_VLTextConfig(
            hidden_size=heads * head_dim,
            num_attention_heads=heads,
            num_key_value_heads=params["kv_heads"],
            num_hidden_layers=1,
        ),
        layer_idx=0,
    )
    tables = (inputs["cos"][None], inputs["sin"][None])
    flat = {name: inputs[name].transpose(0, 1).flatten(1)[None] for name in ("q", "k")}
    last = (tables[0][:, -1:], tables[1][:, -1:])
    start, total = params["image_start"], params["N"]
    results = {}
    for suffix, rotated in (("", True), ("_norope", False)):
        if rotated:
            query, key = (
                rotate(attention, flat["q"][:, -1:], last, "q_norm"),
                rotate(attention, flat["k"], tables, "k_norm"),
            )
        else:
            query, key = flat["q"][:, -1:].unflatten(-1, (heads, -1)), flat["k"].unflatten(-1, (params["kv_heads"], -1))
        scores = row_attention(query, key, scale=attention.scaling, reduce="mean")[0, 0, start : start + total]
        results[f"scores{suffix}"] = scores
        results[f"keep_idx{suffix}"] = start + pyramiddrop_keep(scores, (0, total), (params["keep"],))
    return results


def pyramiddrop(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of one stage, of a whole model, or of grouped queries."""
    if "decode_embeds" in inputs:
        return pyramiddrop_model(params, inputs)
    return (pyramiddrop_stage if "hidden" in inputs else pyramiddrop_grouped)(params, inputs)


@torch.no_grad()
def fastv_model(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Prefill and decode of a whole language model."""
    total, start = params["N"], params["image_start"]
    length = start + total + params["text_after"]
    llava = whole_model(params, inputs, (start, total))
    method = NotingFastV(layer=params["K"], ratio=1 - params["keep_ratio"], rounding="floor")
    vlmprune.apply(llava.model, method)
    llava.watch()
    output = llava.model.model(**llava.inputs, use_cache=True)
    cache = output.past_key_values
    (image,) = vlmprune.last_run(llava.model).images
    results = {
        "keep_visual": image.kept,
        "kv_len_prefill": cache_lengths(cache),
        "scores": method.batches[0].attention,
        "prefill_out": kept_columns(output.last_hidden_state, start, total, image.kept),
    }
    llava.take_seen()
    steps = [decode_step(llava, cache, length + step, step) for step in range(len(inputs["decode_embeds"]))]
    for step, (_, positions, _) in enumerate(steps):
        if positions.unique().tolist() != [length + step]:
            raise AssertionError(f"decode positions {positions.tolist()} instead of {length + step} in every layer")
    return {**results, "decode_out": torch.stack([hidden for hidden, _, _ in steps])}  # type: ignore[dict-item]


def fastv_selection(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """The ranking by the last query `[heads, head_dim]` and the keys `[heads, L, head_dim]`, each with a row axis or without."""
    start, total, argument = params["image_start"], params["N"], params["arg"]
    batched = inputs["k"].ndim == 4
    query, key = (values if batched else values[None] for values in (inputs["q_last"], inputs["k"]))
    rows = row_attention(query[:, None], key.transpose(1, 2), reduce="mean")[:, 0]
    length, scores = rows.shape[1], rows[:, start : start + total]
    if params["variant"] == "rank":
        count = argument
    elif params["variant"] == "lmms":
        count = fastv_count(total, 1 - argument, "floor")
    else:
        count = fastv_count(total, argument)
    offsets = range(0, scores.numel() + 1, total)
    visual = start + fastv_keep(scores.flatten(), offsets, (count,) * len(scores)).view(len(scores), count)
    before, after = (
        span.expand(len(scores), -1) for span in (torch.arange(start), torch.arange(start + total, length))
    )
    results = {"scores": scores, "visual_keep_idx": visual, "keep_idx": torch.cat([before, visual, after], dim=1)}
    return results if batched else {name: values[0] for name, values in results.items()}


def fastv(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of the ranking or of a whole model."""
    return (fastv_model if "decode_embeds" in inputs else fastv_selection)(params, inputs)


def text_config(params: Mapping[str, Any], layers: int, ffn: int) -> dict[str, Any]:
    """Return what the configuration of the language model of a case needs."""
    return {
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": params["heads"],
        "num_key_value_heads": params.get("kv_heads", params["heads"]),
        "rms_norm_eps": params["rms_eps"],
        "rope_parameters": {"rope_type": "default", "rope_theta": params["rope_theta"]},
        "max_position_embeddings": 4096,
    }


def plain_layers(dim: int, layers: int, ffn: int = 8) -> dict[str, Tensor]:
    """Return weights of layers that pass their input on."""
    shapes = {f"self_attn.{kind}_proj": (dim, dim) for kind in "qkvo"}
    shapes |= {"mlp.gate_proj": (ffn, dim), "mlp.up_proj": (ffn, dim), "mlp.down_proj": (dim, ffn)}
    weights = {"norm.weight": torch.ones(dim)}
    for layer in range(layers):
        weights |= {f"layers.{layer}.{name}.weight": torch.zeros(shape) for name, shape in shapes.items()}
        for name in ("input_layernorm", "post_attention_layernorm"):
            weights[f"layers.{layer}.{name}.weight"] = torch.ones(dim)
    return weights


def whole_model(params: Mapping[str, Any], inputs: Tensors, span: tuple[int, int]) -> InjectedLlava:
    """Return the model of a case with one row, whose image lies in `span`."""
    weights = {name.removeprefix("w."): values for name, values in inputs.items() if name.startswith("w.")}
    embeddings = inputs["inputs_embeds"]
    ffn = weights["layers.0.mlp.up_proj.weight"].shape[0]
    mask = torch.ones(embeddings.shape[:2], dtype=torch.int64)
    text = text_config(params, params["layers"], ffn)
    if "layers.0.self_attn.q_proj.bias" in weights:
        # Qwen2 has no bias behind the attention, Llama has one everywhere or nowhere.
        text["attention_bias"] = True
        none = embeddings.new_zeros(embeddings.shape[-1])
        weights |= {f"layers.{layer}.self_attn.o_proj.bias": none for layer in range(params["layers"])}
    return InjectedLlava(embeddings, mask, [span], text, weights, inputs["decode_embeds"])


def decode_step(llava: InjectedLlava, cache: Any, position: int, step: int) -> tuple[Tensor, Tensor, Tensor]:
    """One decode step as `generate` calls it; hidden states, positions per layer and cache lengths."""
    output = llava.model.model(
        input_ids=llava.later_ids[step].view(1, 1),
        position_ids=torch.tensor([[position]]),
        attention_mask=torch.ones(1, position + 1, dtype=torch.int64),
        past_key_values=cache,
        use_cache=True,
    )
    positions = torch.stack([layer["positions"].flatten()[-1] for layer in llava.take_seen()])
    return output.last_hidden_state[0], positions, cache_lengths(cache)


def decoded_states(llava: InjectedLlava, cache: Any, length: int) -> Tensor:
    """Return the hidden states of all decode steps of a case after `length` tokens, `[steps, 1, dim]`."""
    return torch.stack([decode_step(llava, cache, length + step, step)[0] for step in range(len(llava.later_ids))])


def watched_run(llava: InjectedLlava, length: int) -> dict[str, Tensor]:
    """Return hidden states of the prefill's last tokens, cache lengths, and the states of all decode steps."""
    llava.watch()
    output = llava.model.model(**llava.inputs, use_cache=True)
    cache, run = output.past_key_values, vlmprune.last_run(llava.model)
    columns = run.kept_columns(0, len(cache.layers) - 1)
    results = {"prefill_out": output.last_hidden_state[:, columns], "kv_len_prefill": cache_lengths(cache)}
    llava.take_seen()
    return {**results, "decode_out": decoded_states(llava, cache, length)}


def kept_columns(hidden: Tensor, start: int, total: int, kept: Tensor) -> Tensor:
    """Return the columns of text and of the kept visual tokens of `hidden [1, columns, dim]`."""
    length = hidden.shape[1]
    return hidden[:, torch.cat([torch.arange(start), start + kept, torch.arange(start + total, length)])]


def _padded(rows: list[Tensor]) -> Tensor:
    return pad_sequence(rows, batch_first=True, padding_value=-1)


RUNS = {"pyramiddrop": pyramiddrop, "fastv": fastv}
