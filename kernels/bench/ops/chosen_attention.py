"""`chosen_attention` against the attention maps of all rows, of which the chosen ones are taken."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import HEAD_DIM, HEADS, KV_HEADS, Case, Contender, Plan, close
from vlmprune.kernels.chosen_attention import chosen_attention

QUERIES = 32


def plan(case: Case) -> Plan:
    query = case.random(case.tokens, HEADS, HEAD_DIM)
    key = case.random(case.tokens, KV_HEADS, HEAD_DIM)
    columns = torch.arange(case.tokens // 2, device=case.device)
    chosen = query[-QUERIES:]
    last = torch.arange(case.tokens - len(chosen), case.tokens, device=case.device)

    def whole() -> Tensor:
        return by_hand(query, key, columns)[-QUERIES:]

    square = HEADS * case.tokens**2
    return key.nbytes + chosen.nbytes + 4 * len(chosen) * len(columns), [
        Contender("ours", "", lambda: chosen_attention(chosen, key, columns, last=last)),
        Contender("official", "eager attention of all rows, the chosen taken", whole, 3 * square, 12 * square),
    ]


def by_hand(query: Tensor, key: Tensor, columns: Tensor) -> Tensor:
    """Causal attention maps of as many queries as keys, averaged over heads, at `columns`."""
    keys = key.repeat_interleave(query.shape[1] // key.shape[1], dim=1)
    scores = torch.einsum("qhd,khd->hqk", query.double(), keys.double()) * query.shape[-1] ** -0.5
    unseen = torch.ones(scores.shape[1:], dtype=torch.bool, device=scores.device).triu(1)
    return scores.masked_fill(unseen, -torch.inf).softmax(-1).mean(0)[:, columns]


def check(device: str) -> bool:
    query, key = torch.randn(70, 4, 80), torch.randn(70, 2, 80)
    columns, rows = torch.arange(5, 40), torch.arange(41, 70)
    expected = by_hand(query, key, columns)[rows]
    found = chosen_attention(query[rows].to(device), key.to(device), columns.to(device), last=rows.to(device))
    return close(found, expected)
