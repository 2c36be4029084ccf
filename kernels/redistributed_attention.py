"""What attention gives more or less once some of its weight moves from sink keys to visual keys, in chosen rows."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, dot_needs_fp32, tl, triton

VALID, VISUAL, SINK = 1, 2, 4
"""Bits of `flags`: a key that may be seen, a visual token, a sink."""

# Added to the weight of every visual key where the share of sinks among them is taken.
SHARE_EPSILON = 1e-6
# Rows of weights that the reference holds at a time.
_ROWS = 64


def redistributed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    last: Tensor,
    *,
    moved: float,
    highest_share: float,
    lowest_weight: float,
    scale: float | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return by how much attention outputs change where weight moves from sinks to visual keys, and where that is.

    With `a` the softmaxed weights of a row in a head, visual keys weigh `V`, and sinks have the share `S` of that. Where
    `V >= lowest_weight` and `S <= highest_share`, every sink loses `moved * a`; what they lose is shared by the visual keys
    that are no sinks, in proportion to their weights.

    Args:
        query: `[batch, rows, heads, head_dim]`, any strides.
        key: `[batch, keys, kv_heads, head_dim]`; `heads` must be a multiple of `kv_heads` (grouped queries).
        value: the same.
        flags: uint8 `[batch, keys]`, bits `VALID`, `VISUAL` and `SINK`.
        last: int64 `[batch, rows]`, index of the last key that a row sees; -1 for a row that nothing is done with.
        moved: share of a sink's weight that moves.
        highest_share: of sinks in the weight of visual keys, counting `SHARE_EPSILON` more for every visual key.
        lowest_weight: of visual keys.
        scale: factor of the logits; None for `head_dim ** -0.5`.
        implementation: forced "torch" or "triton"; None goes by the device.

    Returns:
        fp32 `[batch, rows, heads, head_dim]`, what is to be added, and bool `[batch, rows, heads]`, where weight moves.

    Raises:
        ValueError: a bad shape or dtype.
        KernelUnavailableError: the forced implementation cannot run.
    """
    _check(query, key, value, flags, last)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    arguments = (query, key, value, flags, last, float(moved), float(highest_share), float(lowest_weight), scale)
    if choose_implementation(query.device, implementation) == "triton":
        return _redistributed_attention_triton(*arguments)
    return redistributed_attention_reference(*arguments)


def redistributed_attention_reference(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    last: Tensor,
    moved: float,
    highest_share: float,
    lowest_weight: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    """`redistributed_attention` in plain torch, for arguments that are already checked."""
    batch, _, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    visual, sink = (flags & VISUAL).bool(), (flags & SINK).bool()
    # Only these columns change.
    columns = (visual | sink).any(0).nonzero().flatten()
    # [batch, kv_heads, 1, head_dim, keys] and [batch, kv_heads, 1, columns, head_dim]
    keys_by_head = key.float().permute(0, 2, 3, 1)[:, :, None]
    values_by_head = value[:, columns].float().transpose(1, 2)[:, :, None]
    places = torch.arange(keys, device=query.device)
    deltas, selections = [], []
    for block, ends in zip(query.split(_ROWS, dim=1), last.split(_ROWS, dim=1), strict=True):
        seen = (places <= ends[..., None]) & (flags & VALID).bool()[:, None]
        grouped = (block.float() * scale).unflatten(2, (kv_heads, -1)).permute(0, 2, 3, 1, 4)
        # [batch, kv_heads, groups, rows, keys]
        logits = grouped @ keys_by_head
        hidden = ~seen[:, None, None]
        weights = logits.masked_fill_(hidden, -torch.inf).softmax(-1).masked_fill_(hidden, 0.0)
        selected, factors = redistribution(
            weights[..., columns],
            visual[:, None, None, None, columns],
            sink[:, None, None, None, columns],
            moved,
            highest_share,
            lowest_weight,
        )
        delta = (weights[..., columns] * factors) @ values_by_head
        deltas.append(delta.permute(0, 3, 1, 2, 4).reshape(batch, block.shape[1], heads, head_dim))
        selections.append(selected.permute(0, 3, 1, 2).reshape(batch, block.shape[1], heads))
    if not deltas:
        return query.new_zeros(query.shape, dtype=torch.float32), query.new_zeros(query.shape[:3], dtype=torch.bool)
    return torch.cat(deltas, dim=1), torch.cat(selections, dim=1)


def redistribution(
    weights: Tensor, visual: Tensor, sink: Tensor, moved: float, highest_share: float, lowest_weight: float
) -> tuple[Tensor, Tensor]:
    """Return which rows change, bool `[...]`, and the share of its weight by which every key's grows, fp32 `[..., keys]`.

    Args:
        weights: fp32 `[..., keys]`, of all visual keys and all sinks; other keys may be left out.
        visual: bool, broadcast with `weights`.
        sink: the same.
        moved: see `redistributed_attention`, as are the others.
        highest_share: of sinks in the visual keys' weight.
        lowest_weight: of visual keys.
    """
    both = visual & sink
    seen, seen_sinks = (weights * visual).sum(-1), (weights * both).sum(-1)
    share = (seen_sinks + SHARE_EPSILON * both.sum(-1)) / (seen + SHARE_EPSILON * visual.sum(-1)).clamp(min=1e-30)
    rest = (weights * (visual & ~sink)).sum(-1)
    selected = both.any(-1) & (share <= highest_share) & (seen >= lowest_weight) & (rest > 0)
    gain = moved * (weights * sink).sum(-1) / torch.where(selected, rest, 1.0)
    factors = torch.where(sink, -moved, torch.where(visual, gain[..., None], 0.0))
    return selected, factors * selected[..., None]


def _redistributed_attention_triton(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    flags: Tensor,
    last: Tensor,
    moved: float,
    highest_share: float,
    lowest_weight: float,
    scale: float,
) -> tuple[Tensor, Tensor]:
    batch, rows, heads, head_dim = query.shape
    keys, kv_heads = key.shape[1:3]
    delta = torch.empty(batch, rows, heads, head_dim, dtype=torch.float32, device=query.device)
    selected = torch.empty(batch, rows, heads, dtype=torch.bool, device=query.device)
    if delta.numel() == 0:
        return delta, selected
    if keys == 0:
        return delta.zero_(), selected.zero_()
    # The changed weights times values are fp32 products, which larger blocks spill.
    block_rows = 16
    flags = flags.contiguous()
    _redistribute_kernel[(triton.cdiv(rows, block_rows), heads, batch)](
        *(query, *query.stride(), key, *key.stride(), value, *value.stride()),
        *(flags, last.contiguous(), delta, selected.view(torch.uint8)),
        *(scale, moved, highest_share, lowest_weight, rows, heads, kv_heads, keys, head_dim),
        EPSILON=SHARE_EPSILON, BLOCK_R=block_rows, BLOCK_L=32,
        BLOCK_D=max(16, triton.next_power_of_2(head_dim)), UPCAST=dot_needs_fp32(query, key, value),
        num_warps=8, num_stages=1,
    )  # fmt: skip
    return delta, selected


@triton.jit
def _weights(
    b_q, key, flags, i_b, o_l, o_d, i_kv, b_last, keys, D, scale,
    stride_kb, stride_kl, stride_kh, stride_kd, UPCAST: tl.constexpr,
):  # fmt: skip
    """Logits of one block of keys, -inf where a row does not see them, and the block's flags."""
    m_l = o_l < keys
    p_k = key + i_b * stride_kb + i_kv.to(tl.int64) * stride_kh + o_l.to(tl.int64)[:, None] * stride_kl
    b_k = tl.load(p_k + o_d[None, :] * stride_kd, mask=m_l[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_k = b_k.to(tl.float32)
    b_flags = tl.load(flags + i_b * keys + o_l, mask=m_l, other=0).to(tl.int32)
    b_score = tl.dot(b_q, tl.trans(b_k), input_precision="ieee") * scale
    b_seen = ((b_flags & 1) != 0)[None, :] & (o_l[None, :] <= b_last[:, None])
    return tl.where(b_seen, b_score, -float("inf")), b_flags


@triton.jit
def _redistribute_kernel(
    query, stride_qb, stride_qr, stride_qh, stride_qd,
    key, stride_kb, stride_kl, stride_kh, stride_kd,
    value, stride_vb, stride_vl, stride_vh, stride_vd,
    flags, last, delta, selected, scale, moved, highest_share, lowest_weight, R, H, KV, L, D,
    EPSILON: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_D: tl.constexpr, UPCAST: tl.constexpr,
):  # fmt: skip
    """One block of rows of one head: sums of weights over the keys, then the changed weights times values."""
    i_b = tl.program_id(2).to(tl.int64)
    i_h = tl.program_id(1)
    i_kv = i_h // (H // KV)
    o_r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_r = o_r < R
    b_last = tl.load(last + i_b * R + o_r, mask=m_r, other=-1)
    p_q = query + i_b * stride_qb + i_h.to(tl.int64) * stride_qh + o_r.to(tl.int64)[:, None] * stride_qr
    b_q = tl.load(p_q + o_d[None, :] * stride_qd, mask=m_r[:, None] & (o_d < D)[None, :], other=0.0)
    if UPCAST:
        b_q = b_q.to(tl.float32)

    b_peak = tl.full([BLOCK_R], -float("inf"), dtype=tl.float32)
    b_all = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_visual = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_both = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_sinks = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_visual_count = tl.zeros([BLOCK_R], dtype=tl.float32)
    b_both_count = tl.zeros([BLOCK_R], dtype=tl.float32)
    for i_l in range(0, L, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        b_score, b_flags = _weights(
            b_q, key, flags, i_b, o_l, o_d, i_kv, b_last, L, D, scale,
            stride_kb, stride_kl, stride_kh, stride_kd, UPCAST,
        )  # fmt: skip
        b_new = tl.maximum(b_peak, tl.max(b_score, 1))
        b_zero = tl.where(b_new == -float("inf"), 0.0, b_new)
        b_old = tl.exp(b_peak - b_zero)
        b_exp = tl.exp(b_score - b_zero[:, None])
        is_visual = ((b_flags & 2) != 0).to(tl.float32)
        is_sink = ((b_flags & 4) != 0).to(tl.float32)
        b_all = b_all * b_old + tl.sum(b_exp, 1)
        b_visual = b_visual * b_old + tl.sum(b_exp * is_visual[None, :], 1)
        b_both = b_both * b_old + tl.sum(b_exp * (is_visual * is_sink)[None, :], 1)
        b_sinks = b_sinks * b_old + tl.sum(b_exp * is_sink[None, :], 1)
        b_visual_count += tl.sum(is_visual, 0)
        b_both_count += tl.sum(is_visual * is_sink, 0)
        b_peak = b_new

    b_norm = 1.0 / tl.where(b_all > 0.0, b_all, 1.0)
    b_share = (b_both * b_norm + EPSILON * b_both_count) / tl.maximum(
        b_visual * b_norm + EPSILON * b_visual_count, 1e-30
    )
    b_rest = (b_visual - b_both) * b_norm
    b_ok = (b_share <= highest_share) & (b_visual * b_norm >= lowest_weight) & (b_rest > 0.0) & (b_all > 0.0)
    b_ok = b_ok & (b_both_count > 0.0)
    b_gain = moved * b_sinks * b_norm / tl.where(b_ok, b_rest, 1.0)
    b_zero = tl.where(b_peak == -float("inf"), 0.0, b_peak)

    b_delta = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for i_l in range(0, L, BLOCK_L):
        o_l = i_l + tl.arange(0, BLOCK_L)
        b_changes = tl.load(flags + i_b * L + o_l, mask=o_l < L, other=0).to(tl.int32) & 6
        if tl.max(b_changes, 0) > 0:
            b_score, b_flags = _weights(
                b_q, key, flags, i_b, o_l, o_d, i_kv, b_last, L, D, scale,
                stride_kb, stride_kl, stride_kh, stride_kd, UPCAST,
            )  # fmt: skip
            b_weight = tl.exp(b_score - b_zero[:, None]) * b_norm[:, None]
            b_factor = tl.where(
                ((b_flags & 4) != 0)[None, :], -moved, tl.where(((b_flags & 2) != 0)[None, :], b_gain[:, None], 0.0)
            )
            b_weight = tl.where(b_ok[:, None], b_weight * b_factor, 0.0)
            p_v = value + i_b * stride_vb + i_kv.to(tl.int64) * stride_vh + o_l.to(tl.int64)[:, None] * stride_vl
            b_v = tl.load(p_v + o_d[None, :] * stride_vd, mask=(o_l < L)[:, None] & (o_d < D)[None, :], other=0.0)
            b_delta += tl.dot(b_weight, b_v.to(tl.float32), input_precision="ieee")
    p_row = (i_b * R + o_r) * H + i_h
    tl.store(delta + p_row[:, None] * D + o_d[None, :], b_delta, mask=m_r[:, None] & (o_d < D)[None, :])
    tl.store(selected + p_row, b_ok.to(tl.uint8), mask=m_r)


def _check(query: Tensor, key: Tensor, value: Tensor, flags: Tensor, last: Tensor) -> None:
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape:
        raise ValueError(
            "query must be [batch, rows, heads, head_dim], key and value [batch, keys, kv_heads, head_dim]; "
            f"got {tuple(query.shape)}, {tuple(key.shape)} and {tuple(value.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3] or query.shape[2] % max(key.shape[2], 1):
        raise ValueError(
            "query and key must agree in batch and head_dim, and heads must be a multiple of kv_heads; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if flags.dtype != torch.uint8 or flags.shape != key.shape[:2]:
        raise ValueError(f"flags must be uint8 {tuple(key.shape[:2])}; got {flags.dtype} {tuple(flags.shape)}.")
    if last.dtype != torch.int64 or last.shape != query.shape[:2]:
        raise ValueError(f"last must be int64 {tuple(query.shape[:2])}; got {last.dtype} {tuple(last.shape)}.")


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype} {rows} rows", _redistributed_attention_triton,
        (
            Like(dtype, (2, rows, 32, 128)), Like(dtype, (2, 700, 8, 128)), Like(dtype, (2, 700, 8, 128)),
            Like(torch.uint8, (2, 700)), Like(torch.int64, (2, rows)), 0.4, 0.5, 0.2, 0.1,
        ),
    )
    for dtype, rows in ((torch.bfloat16, 1), (torch.bfloat16, 100), (torch.float32, 100))
)  # fmt: skip
