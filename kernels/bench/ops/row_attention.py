"""`row_attention` against einsum and against eager attention of all rows."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.bench.case import HEAD_DIM, HEADS, KV_HEADS, Case, Contender, Plan, close
from vlmprune.kernels.row_attention import row_attention


def plan(case: Case) -> Plan:
    query = case.random(case.batch, 1, HEADS, HEAD_DIM)
    key = case.random(case.batch, case.tokens, KV_HEADS, HEAD_DIM)
    rows = case.random(case.batch, HEADS, case.tokens, HEAD_DIM)

    def straightforward() -> Tensor:
        keys = key.repeat_interleave(HEADS // KV_HEADS, dim=2)
        scores = torch.einsum("brhd,blhd->brhl", query.float(), keys.float()) * HEAD_DIM**-0.5
        return scores.softmax(-1).mean(2)

    def eager() -> Tensor:
        keys = key.repeat_interleave(HEADS // KV_HEADS, dim=2).transpose(1, 2)
        weights = (rows @ keys.transpose(2, 3) * HEAD_DIM**-0.5).softmax(-1, dtype=torch.float32).to(case.dtype)
        return weights[:, :, -1].mean(1)

    square = case.batch * HEADS * case.tokens**2
    return key.nbytes + query.nbytes + 4 * case.batch * case.tokens, [
        Contender("ours", "", lambda: row_attention(query, key, reduce="mean")),
        Contender("torch", "einsum and softmax of the row", straightforward),
        Contender("official", "eager attention of all rows, last one taken", eager, 3 * square, 12 * square),
    ]


def check(device: str) -> bool:
    query, key = torch.randn(2, 3, 4, 80), torch.randn(2, 577, 4, 80)
    expected = (torch.einsum("brhd,blhd->brhl", query.double(), key.double()) * 80**-0.5).softmax(-1).mean(2)
    return close(row_attention(query.to(device), key.to(device), reduce="mean"), expected)
