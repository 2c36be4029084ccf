"""Cases of SparseVLM: raters, stages given by attention, version 2's relation, and whole language models."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from transformers import LlamaConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

import vlmprune
from official_cases.input_site import Tensors
from official_cases.layer_site import watched_run, whole_model
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.methods import SparseVLM
from vlmprune.methods.layer.sparsevlm import (
    find_raters,
    merge_groups,
    plus_heads,
    plus_relation,
    rater_relevance,
    recycled_tokens,
    select_and_recycle,
)
from vlmprune.patches.rotation import rotate_heads


def sparsevlm_raters(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Which text rates, of embeddings `[1, tokens, dim]`."""
    visual, text = inputs["visual"][0], inputs["text"][0]
    return {"relevance": rater_relevance(visual, text)[None], "rater_idx": find_raters(visual, text)}


def sparsevlm_stage(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One stage, by the attention rows of all text behind the image `[heads, text, tokens]`."""
    total, start, hidden = params["N"], params["image_start"], inputs["hidden"]
    rows = inputs["attn_text_rows"][:, inputs["rater_idx"], start : start + total]
    relation = rows.mean(0).mean(0)
    method = SparseVLM(tokens=(params["requested_keep"],), layers=(1,))
    stage = method.stage(0, total, total)
    visual = hidden[0, start : start + total]
    named, groups = select_and_recycle(relation, visual, stage)
    rows_out = merge_groups(visual, groups, (total,), (stage.total,)).to(hidden)
    new = torch.cat([hidden[0, :start], rows_out, hidden[0, start + total :]])
    return {
        "relation": relation,
        "keep_idx": start + named[: stage.kept],
        "merge_src_idx": start + recycled_tokens(relation, named[: stage.kept], stage.recycled),
        "merged": rows_out[None, stage.kept :],
        "out_hidden": new[None],
    }


def sparsevlm_plus(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """The relation of version 2, from whole attention maps `[1, heads, tokens, tokens]`."""
    start, total, head_dim = params["image_start"], params["N"], params["head_dim"]
    attention = inputs["attn"][0].transpose(0, 1)
    length = len(attention)
    config = LlamaConfig(
        hidden_size=head_dim,
        num_attention_heads=1,
        head_dim=head_dim,
        rope_parameters={"rope_type": "default", "rope_theta": params["rope_theta"]},
    )
    ones = torch.ones(1, length, 1, head_dim)
    rotated = rotate_heads(
        _llama_attention(config), ones, LlamaRotaryEmbedding(config)(ones, torch.arange(length)[None])
    )
    gravity = rotated[0, :, 0] @ rotated[0, :, 0].T / head_dim**0.5
    raters, visual = start + total + inputs["rater_idx"], slice(start, start + total)
    rows, weights = attention[raters][..., visual], gravity[raters][:, visual]
    relation = plus_relation(rows, weights, params["selected_heads"])
    kept = segmented_topk(relation, (0, total), (params["keep"],))
    return {
        "head_idx": plus_heads(rows, weights, params["selected_heads"]),
        "relation": relation,
        "keep_idx": start + kept,
        "rope_weights": gravity,
    }


def _llama_attention(config: LlamaConfig) -> Module:
    from transformers.models.llama.modeling_llama import LlamaAttention

    return LlamaAttention(config, layer_idx=0)


@torch.no_grad()
def sparsevlm_model(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Prefill and decode of a whole language model."""
    total, start = params["N"], params["image_start"]
    length = start + total + params["text_after"]
    llava = whole_model(params, inputs, (start, total))
    layers = tuple(layer + 1 for layer in params["pruning_layers"])
    variant = "v2" if str(params.get("version", "1")).startswith(("2", "v2")) else "v1"
    vlmprune.apply(llava.model, SparseVLM(layers=layers, tokens=tuple(params["keep"]), variant=variant))
    return watched_run(llava, length)


def sparsevlm(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A case of any kind."""
    if "decode_embeds" in inputs:
        return sparsevlm_model(params, inputs)
    if "attn" in inputs:
        return sparsevlm_plus(params, inputs)
    return (sparsevlm_stage if "hidden" in inputs else sparsevlm_raters)(params, inputs)


RUNS = {"sparsevlm": sparsevlm}
