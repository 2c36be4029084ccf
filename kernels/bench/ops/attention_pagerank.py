"""`attention_pagerank` against powers of whole attention matrices, as AIM's published code has them."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.attention_pagerank import attention_pagerank
from vlmprune.kernels.bench.case import CHECK_LENGTHS, CHECK_OFFSETS, HEAD_DIM, HEADS, Case, Contender, Plan, close

ROUNDS = 5


def plan(case: Case) -> Plan:
    query = case.random(case.batch * case.tokens, HEADS, HEAD_DIM)
    key = case.random(case.batch * case.tokens, HEADS, HEAD_DIM)
    queries, keys = (x.view(case.batch, case.tokens, HEADS, HEAD_DIM).transpose(1, 2) for x in (query, key))
    square = case.batch * HEADS * case.tokens**2

    def official() -> Tensor:
        weights = ((queries.float() @ keys.float().transpose(2, 3)) * HEAD_DIM**-0.5).softmax(-1)
        votes = weights.new_full((case.batch, HEADS, 1, case.tokens), 1 / case.tokens)
        for _ in range(ROUNDS):
            votes = votes @ weights
        return votes.square().mean(1).sqrt()

    return query.nbytes + key.nbytes + 4 * case.batch * case.tokens, [
        Contender(
            "ours", "", lambda: attention_pagerank(query, key, case.offsets, ROUNDS),
            square if case.device == "cpu" else 0,
        ),
        Contender("official", "whole matrices, then a product a round", official, 3 * square, 12 * square),
    ]  # fmt: skip


def check(device: str) -> bool:
    query, key = torch.randn(CHECK_OFFSETS[-1], 2, 80), torch.randn(CHECK_OFFSETS[-1], 2, 80)
    expected = []
    for q, x in zip(query.double().split(CHECK_LENGTHS), key.double().split(CHECK_LENGTHS), strict=True):
        weights = (torch.einsum("qhd,khd->hqk", q, x) * 80**-0.5).softmax(-1)
        votes = weights.new_full((2, 1, len(q)), 1 / max(1, len(q)))
        for _ in range(ROUNDS):
            votes = votes @ weights
        expected.append(votes.square().mean((0, 1)).sqrt())
    found = attention_pagerank(query.to(device), key.to(device), CHECK_OFFSETS, ROUNDS)
    return close(found, torch.cat(expected))
