"""`received_attention` against the softmax of the whole matrix."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from vlmprune.kernels.bench.case import CHECK_LENGTHS, CHECK_OFFSETS, HEAD_DIM, HEADS, Case, Contender, Plan, close
from vlmprune.kernels.received_attention import received_attention


def plan(case: Case) -> Plan:
    query = case.random(case.batch * case.tokens, HEADS, HEAD_DIM)
    key = case.random(case.batch * case.tokens, HEADS, HEAD_DIM)
    queries, keys = (x.view(case.batch, case.tokens, HEADS, HEAD_DIM).transpose(1, 2) for x in (query, key))
    square = case.batch * HEADS * case.tokens**2

    def straightforward() -> Tensor:
        scores = queries.float() @ keys.float().transpose(2, 3) * HEAD_DIM**-0.5
        return scores.softmax(-1).mean(2).mean(1)

    return query.nbytes + key.nbytes + 4 * case.batch * case.tokens, [
        Contender(
            "ours", "", lambda: received_attention(query, key, case.offsets), square if case.device == "cpu" else 0
        ),
        Contender("torch", "softmax of the whole matrix, mean", straightforward, 3 * square, 12 * square),
        Contender(
            "library", "scaled_dot_product_attention forward, same shape",
            lambda: functional.scaled_dot_product_attention(queries, keys, keys),
            square if case.device == "cpu" else 0,
        ),
    ]  # fmt: skip


def check(device: str) -> bool:
    query, key = torch.randn(CHECK_OFFSETS[-1], 2, 80), torch.randn(CHECK_OFFSETS[-1], 2, 80)
    pairs = zip(query.double().split(CHECK_LENGTHS), key.double().split(CHECK_LENGTHS), strict=True)
    received = [(torch.einsum("qhd,khd->hqk", q, x) * 80**-0.5).softmax(-1).sum((0, 1)) / 2 for q, x in pairs]
    found = received_attention(query.to(device), key.to(device), CHECK_OFFSETS, reduce_queries="sum")
    return close(found, torch.cat(received))
