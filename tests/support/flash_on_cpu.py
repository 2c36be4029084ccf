"""A stand-in for FlashAttention-2 on the CPU: what the library accepts it computes, what the library cannot do it refuses.

transformers' own path to the library runs as it is: masks of two dimensions or none, unpadding, packed sequences by position
ids, variable lengths. Only the two kernels behind it are written in torch, with the signatures and the semantics of
`flash_attn_func` and `flash_attn_varlen_func` 2.1 and later (causal masks are aligned at the bottom right). Unlike the kernels
they take fp32, so that results can be compared closely.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers import modeling_flash_attention_utils as host
from transformers.integrations.flash_attention import flash_attention_forward
from transformers.masking_utils import flash_attention_mask

NAME = "flash_attention_2_on_cpu"


def flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
) -> Tensor:
    """Attend with `q [batch, tokens, heads, dim]` to keys and values `[batch, keys, key heads, dim]`, nothing masked."""
    if q.ndim != 4 or k.shape != v.shape or q.shape[0] != k.shape[0]:
        raise ValueError(f"flash_attn_func: q {list(q.shape)}, k {list(k.shape)}, v {list(v.shape)}")
    rows = [_attend(*row, softmax_scale, causal, window_size, softcap) for row in zip(q, k, v, strict=True)]
    return torch.stack(rows)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    deterministic: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Attend within sequences laid end to end: `q [tokens, heads, dim]`, bounds int32 `[sequences + 1]`."""
    if q.ndim != 3 or cu_seqlens_q.dtype != torch.int32 or cu_seqlens_k.dtype != torch.int32:
        raise ValueError(
            f"flash_attn_varlen_func: q {list(q.shape)}, bounds {cu_seqlens_q.dtype}, {cu_seqlens_k.dtype}"
        )
    for bounds, longest, tokens, name in (
        (cu_seqlens_q, max_seqlen_q, q, "q"),
        (cu_seqlens_k, max_seqlen_k, k, "k"),
    ):
        lengths = bounds.diff()
        if int(bounds[0]) != 0 or int(bounds[-1]) != len(tokens) or int(lengths.max()) != int(longest):
            raise ValueError(f"cu_seqlens_{name} {bounds.tolist()}, max {longest}: {len(tokens)} tokens")
    queries, keys = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    parts = zip(q.split(queries), k.split(keys), v.split(keys), strict=True)
    return torch.cat([_attend(*part, softmax_scale, causal, window_size, softcap) for part in parts])


def _attend(
    q: Tensor, k: Tensor, v: Tensor, scale: float | None, causal: bool, window: tuple[int, int], softcap: float
) -> Tensor:
    if softcap or min(window) >= 0:
        raise NotImplementedError("windows and soft caps")
    if causal and len(q) > len(k):
        raise ValueError(f"{len(q)} queries attend causally to {len(k)} keys: the first of them to none")
    groups = q.shape[1] // k.shape[1]
    scores = torch.einsum("qhd,khd->hqk", q, k.repeat_interleave(groups, 1)).float()
    scores = scores * (q.shape[-1] ** -0.5 if scale is None else scale)
    if causal:
        later = torch.ones(len(q), len(k), dtype=torch.bool).triu(len(k) - len(q) + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return torch.einsum("hqk,khd->qhd", scores.softmax(-1).to(v.dtype), v.repeat_interleave(groups, 1))


def attend(module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **kwargs: Any) -> Any:
    """Hand the call to transformers' path to FlashAttention, unless FlashAttention could not do what it asks for."""
    if attention_mask is not None:
        shape = [query.shape[0], key.shape[2]]
        if not isinstance(attention_mask, Tensor) or attention_mask.is_floating_point():
            raise TypeError(f"FlashAttention takes no mask but a 2-D one of bools or ints, not {attention_mask!r}")
        if list(attention_mask.shape) != shape:
            raise TypeError(f"FlashAttention takes a mask {shape} (rows, keys), not {list(attention_mask.shape)}")
    elif kwargs.get("cu_seq_lens_q") is None:
        _check_positions(kwargs.get("position_ids"), query.shape[0], key.shape[2])
    return flash_attention_forward(module, query, key, value, attention_mask, **kwargs)


def _check_positions(positions: Tensor | None, batch: int, keys: int) -> None:
    """Refuse positions with gaps, which transformers would take for several sequences in one row."""
    if positions is None or batch != 1 or positions.shape[-1] == 1:
        return
    if positions.ndim != 2:
        raise TypeError(f"position_ids of an attention call are [batch, tokens], not {list(positions.shape)}")
    steps = positions.diff()
    begins = (steps != 1) & (positions[:, 1:] == positions.min())
    if not bool(((steps == 1) | begins).all()):
        raise ValueError(f"position_ids {positions.tolist()} have gaps, and no sequence begins there")
    if bool(begins.any()) and keys != positions.shape[-1]:
        raise ValueError("several sequences in one row, and a cache before them")


@contextmanager
def flash_on_cpu(*models: Any) -> Iterator[None]:
    """Run the attention of the models, towers included, through the stand-in."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, flash_attention_mask)
    process = host._lazy_define_process_function(flash_attn_varlen_func)
    loaded = {
        "_loaded_implementation": NAME,
        "_flash_fn": flash_attn_func,
        "_flash_varlen_fn": flash_attn_varlen_func,
        "_flash_with_kvcache_fn": None,
        "_pad_fn": host._pad_input,
        "_unpad_fn": host._unpad_input,
        "_process_flash_kwargs_fn": process,
        "_process_with_kvcache_kwargs_fn": dict,
    }
    # Older hosts have no use for the last.
    before = {name: getattr(host, name) for name in loaded if hasattr(host, name)}
    previous = [{name: part.config._attn_implementation for name, part in _parts(model)} for model in models]
    try:
        for name in before:
            setattr(host, name, loaded[name])
        for model in models:
            for _, part in _parts(model):
                part.config._attn_implementation = NAME
        yield
    finally:
        for model, names in zip(models, previous, strict=True):
            for name, part in _parts(model):
                part.config._attn_implementation = names[name]
        for name, value in before.items():
            setattr(host, name, value)


def _parts(model: Any) -> list[tuple[str, Any]]:
    return [(name, part) for name, part in model.named_modules() if hasattr(part, "config")]
