"""Attention of a few chosen query rows (the CLS token, the last prompt token) over all keys."""

from __future__ import annotations

import torch
from torch import Tensor
from vlmprune.kernels.implementation import choose_implementation

REDUCTIONS = ("none", "mean", "sum")


def row_attention(
    query: Tensor,
    key: Tensor,
    *,
    scale: float | None = None,
    mask: Tensor | None = None,
    reduce: str = "none",
    logits: bool = False,
    implementation: str | None = None,
) -> Tensor:
    """Return `softmax(scale * query key^T)` of the given rows: fp32 `[batch, rows, heads, keys]`.

    Args:
        query: `[batch, rows, heads, head_dim]`, any strides.
        key: `[batch, keys, kv_heads, head_dim]`; `heads` must be a multiple of `kv_heads` (grouped queries).
        scale: factor of the logits; None for `head_dim ** -0.5`.
        mask: bool `[batch, keys]` or `[batch, rows, keys]`, True where a row may look. Masked keys get 0, or -inf as
            logits; a row that sees no key gets 0 everywhere.
        reduce: "none", or the "mean" or "sum" over heads: `[batch, rows, keys]`.
        logits: leave the softmax out.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape or reduction.
        KernelUnavailableError: the forced implementation cannot run.
    """
    _check(query, key, mask, reduce)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    choose_implementation(query.device, implementation)
    return row_attention_reference(query, key, scale, mask, reduce, logits)


def row_attention_reference(
    query: Tensor, key: Tensor, scale: float, mask: Tensor | None, reduce: str, logits: bool
) -> Tensor:
    """`row_attention` in plain torch, for arguments that are already checked."""
    batch, rows, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    grouped = (query.to(torch.float32) * scale).reshape(batch, rows, kv_heads, heads // kv_heads, head_dim)
    queries = grouped.permute(0, 2, 1, 3, 4).reshape(batch, kv_heads, rows * (heads // kv_heads), head_dim)
    scores = queries @ key.to(torch.float32).permute(0, 2, 3, 1)
    scores = scores.view(batch, kv_heads, rows, heads // kv_heads, keys).permute(0, 2, 1, 3, 4)
    scores = scores.reshape(batch, rows, heads, keys)
    if mask is not None:
        hidden = ~(mask[:, None, None, :] if mask.dim() == 2 else mask[:, :, None, :])
        scores = scores.masked_fill(hidden, -torch.inf)
    if not logits:
        scores = scores.softmax(-1)
        if mask is not None:
            scores = scores.masked_fill(hidden, 0.0)
    if reduce == "none":
        return scores
    return scores.mean(2) if reduce == "mean" else scores.sum(2)


def _check(query: Tensor, key: Tensor, mask: Tensor | None, reduce: str) -> None:
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce={reduce!r} is not one of {', '.join(REDUCTIONS)}.")
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            "query must be [batch, rows, heads, head_dim] and key [batch, keys, kv_heads, head_dim]; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[2] % max(key.shape[2], 1):
        raise ValueError(
            "query and key must agree in batch and head_dim, and heads must be a multiple of kv_heads; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if mask is not None:
        allowed = ((query.shape[0], key.shape[1]), (query.shape[0], query.shape[1], key.shape[1]))
        if mask.dtype != torch.bool or tuple(mask.shape) not in allowed:
            raise ValueError(
                f"mask must be bool of shape {allowed[0]} or {allowed[1]}; got {mask.dtype} {tuple(mask.shape)}."
            )
