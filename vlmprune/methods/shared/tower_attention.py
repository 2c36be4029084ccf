"""Attention of a vision tower's block as encoder methods score by it, without the square matrix."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.received_attention import received_attention
from vlmprune.methods.encoder_method import BlockBatch


def attention_received(batch: BlockBatch) -> Tensor:
    """Return the attention that each token receives, mean over heads and queries: fp32 `[tiles, tokens]`."""
    query, key = biased_rows(batch)
    tiles, tokens = query.shape[:2]
    offsets = range(0, tiles * tokens + 1, tokens)
    received = received_attention(query.flatten(0, 1), key.flatten(0, 1), offsets, scale=batch.scale, max_seqlen=tokens)
    return received.view(tiles, tokens)


def attention_given(batch: BlockBatch, row: int) -> Tensor:
    """Return the attention that one token gives to all, mean over heads: fp32 `[tiles, tokens]`."""
    query, key = biased_rows(batch)
    logits = torch.einsum("thd,tkhd->thk", query[:, row].float(), key.float()) * batch.scale
    return logits.softmax(-1).mean(1)


def biased_rows(batch: BlockBatch) -> tuple[Tensor, Tensor]:
    """Return queries and keys `[tiles, tokens, heads, head_dim]` whose products have the block's logarithm of sizes in them.

    It is one more channel: the logarithm in the keys, and what undoes the scale in the queries.
    """
    query, key = batch.query, batch.key
    assert query is not None
    assert key is not None
    if not batch.biased or batch.sizes is None:
        return query, key
    bias = batch.sizes.log()[..., None, None].expand(*key.shape[:3], 1)
    undo = bias.new_full((), 1 / batch.scale).expand(*query.shape[:3], 1)
    return torch.cat([query.float(), undo], -1), torch.cat([key.float(), bias], -1)


def mean_keys(batch: BlockBatch) -> Tensor:
    """Return the keys of the block, mean over heads: fp32 `[tiles, tokens, head_dim]`."""
    assert batch.key is not None
    return batch.key.float().mean(2)
