"""`redistributed_attention` against eager attention maps that are changed and multiplied with the values again."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import HEAD_DIM, HEADS, KV_HEADS, Case, Contender, Plan, close
from vlmprune.kernels.redistributed_attention import SINK, VALID, VISUAL, redistributed_attention, redistribution

_ROWS, _SETTINGS = 64, (0.4, 0.5, 0.2)


def plan(case: Case) -> Plan:
    keys = case.tokens + _ROWS
    query = case.random(case.batch, _ROWS, HEADS, HEAD_DIM)
    key, value = (case.random(case.batch, keys, KV_HEADS, HEAD_DIM) for _ in range(2))
    flags = _flags(case.batch, keys, case.tokens).to(case.device)
    last = torch.arange(case.tokens, keys, device=case.device).expand(case.batch, -1)

    def ours() -> Tensor:
        return redistributed_attention(query, key, value, flags, last, moved=0.4, highest_share=0.5, lowest_weight=0.2)[
            0
        ]

    def eager() -> Tensor:
        return _by_maps(query, key, value, flags, last)

    maps = case.batch * HEADS * _ROWS * keys
    return 2 * key.nbytes + query.nbytes, [
        Contender("ours", "", ours),
        Contender("torch", "whole maps, changed and multiplied again", eager, 6 * maps, 24 * maps),
    ]


def check(device: str) -> bool:
    query = torch.randn(2, 5, 4, 80)
    key, value = torch.randn(2, 99, 2, 80), torch.randn(2, 99, 2, 80)
    flags, last = _flags(2, 99, 90), torch.arange(94, 99).expand(2, -1)
    found, _ = redistributed_attention(
        *(values.to(device) for values in (query, key, value, flags, last)),
        moved=0.4, highest_share=0.5, lowest_weight=0.2,
    )  # fmt: skip
    return close(found, _by_maps(query.double(), key.double(), value.double(), flags, last))


def _flags(batch: int, keys: int, visual: int) -> Tensor:
    flags = torch.full((batch, keys), VALID, dtype=torch.uint8)
    flags[:, 4:visual] |= VISUAL
    flags[:, ::50] |= SINK
    return flags


def _by_maps(query: Tensor, key: Tensor, value: Tensor, flags: Tensor, last: Tensor) -> Tensor:
    groups, exact = query.shape[2] // key.shape[2], query.dtype if query.dtype == torch.float64 else torch.float32
    keys, values = (states.repeat_interleave(groups, dim=2).to(exact) for states in (key, value))
    logits = torch.einsum("brhd,blhd->bhrl", query.to(exact), keys) * query.shape[-1] ** -0.5
    hidden = torch.arange(key.shape[1], device=key.device) > last[:, None, :, None]
    weights = logits.masked_fill(hidden, -torch.inf).softmax(-1)
    visual, sink = ((flags & bit).bool()[:, None, None] for bit in (VISUAL, SINK))
    _, factors = redistribution(weights, visual, sink, *_SETTINGS)
    return torch.einsum("bhrl,blhd->brhd", weights * factors, values)
