"""Size-weighted averages of source tokens into destinations, the base of token merging (ToMe, arXiv 2210.09461)."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton

# Elements of weighted tokens that the reference holds at a time.
BLOCK_ELEMENTS = 2**18


def merge_scatter(
    source: Tensor,
    destination_index: Tensor,
    sizes: Tensor | None,
    num_outputs: int,
    *,
    out_dtype: torch.dtype | None = None,
    implementation: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the merged tokens `[num_outputs, dim]` and their sizes, fp32 `[num_outputs]`.

    Row `o` is `sum(size * source) / sum(size)` over the tokens sent to `o`, added up in fp32 in the order of the tokens, so
    two runs agree to the bit. A row that gets no token, or only tokens of size 0, is 0 with size 0.

    Args:
        source: `[tokens, dim]` floating point, any strides.
        destination_index: int64 `[tokens]`, the output row of each token, -1 for a dropped one. On a GPU an index beyond
            the outputs is not checked and drops its token.
        sizes: `[tokens]`, what each token stands for; None for 1 each.
        num_outputs: number of output rows.
        out_dtype: dtype of the merged tokens; None for that of `source`.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, dtype or index.
        KernelUnavailableError: the forced implementation cannot run.
    """
    tokens = source.shape[0]
    if source.dim() != 2 or not source.is_floating_point():
        raise ValueError(f"source must be floating point [tokens, dim]; got {source.dtype} {tuple(source.shape)}.")
    if destination_index.shape != (tokens,) or destination_index.dtype != torch.int64:
        raise ValueError(
            f"destination_index must be int64 [{tokens}]; got {destination_index.dtype} {tuple(destination_index.shape)}."
        )
    if sizes is not None and sizes.shape != (tokens,):
        raise ValueError(f"sizes must be [{tokens}]; got {tuple(sizes.shape)}.")
    if num_outputs < 0:
        raise ValueError(f"num_outputs={num_outputs} is negative.")
    if choose_implementation(source.device, implementation) == "triton":
        return _merge_scatter_triton(source, destination_index, sizes, num_outputs, out_dtype or source.dtype)
    low, high = (int(bound) for bound in destination_index.aminmax()) if tokens else (0, -1)
    if low < -1 or high >= num_outputs:
        raise ValueError(f"destination_index must lie in -1..{num_outputs - 1}; got {low}..{high}.")
    merged, total = merge_scatter_reference(source, destination_index, sizes, num_outputs, drops=low < 0)
    return merged.to(out_dtype or source.dtype), total


def merge_scatter_reference(
    source: Tensor, destination_index: Tensor, sizes: Tensor | None, num_outputs: int, *, drops: bool = True
) -> tuple[Tensor, Tensor]:
    """`merge_scatter` in plain torch and fp32, for arguments that are already checked; `drops`: an index may be -1."""
    tokens, dim = source.shape
    ones = torch.ones(tokens, dtype=torch.float32, device=source.device)
    weights = ones if sizes is None else sizes.to(torch.float32)
    # Dropped tokens go to one more row, which is cut off.
    rows = destination_index.masked_fill(destination_index < 0, num_outputs) if drops else destination_index
    total = weights.new_zeros(num_outputs + drops).scatter_add_(0, rows, weights)
    # Each token's share of its row, so that no second pass over the rows is needed.
    share = weights / total.masked_fill(total == 0, 1.0)[rows]
    if source.dtype == torch.float32 and source.is_contiguous() and source.numel():
        # The tokens of each row in their order: a weighted sum over bags of them writes no products.
        members, counts = rows.argsort(stable=True), torch.bincount(rows, minlength=num_outputs + drops)
        bags = counts.cumsum(0) - counts
        merged = embedding_bag(members, source, bags, mode="sum", per_sample_weights=share[members])
        return merged[:num_outputs], total[:num_outputs]
    merged = weights.new_zeros(num_outputs + drops, dim)
    # A block at a time: fresh memory for all products costs more than the products.
    block = max(1, BLOCK_ELEMENTS // max(1, dim))
    for begin in range(0, tokens, block):
        part = slice(begin, begin + block)
        merged.index_add_(0, rows[part], source[part].to(torch.float32) * share[part, None])
    return merged[:num_outputs], total[:num_outputs]


def _merge_scatter_triton(
    source: Tensor, destination_index: Tensor, sizes: Tensor | None, num_outputs: int, out_dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    device = source.device
    dim = source.shape[1]
    merged = torch.empty(num_outputs, dim, dtype=out_dtype, device=device)
    total = torch.empty(num_outputs, dtype=torch.float32, device=device)
    if num_outputs == 0:
        return merged, total
    # A stable sort lists the tokens of each output in their order: the sum needs no atomics and no second pass.
    rows, members = destination_index.sort(stable=True)
    ends = torch.searchsorted(rows, torch.arange(num_outputs + 1, device=device))
    block = min(512, max(16, triton.next_power_of_2(dim)))
    weights = source if sizes is None else sizes.to(torch.float32)
    _merge_kernel[(num_outputs, max(1, triton.cdiv(dim, block)))](
        *(source, *source.stride(), weights, weights.stride(0), members, ends, merged, total, dim),
        BLOCK_M=4, BLOCK_D=block, WEIGHTED=sizes is not None, num_warps=4,
    )  # fmt: skip
    return merged, total


@triton.jit
def _merge_kernel(
    source,
    stride_t,
    stride_d,
    weights,
    stride_w,
    members,
    ends,
    merged,
    total,
    D,
    BLOCK_M: tl.constexpr,
    BLOCK_D: tl.constexpr,
    WEIGHTED: tl.constexpr,
):
    """One output row and block of features a program; its tokens a few at a time."""
    i_o = tl.program_id(0).to(tl.int64)
    i_begin = tl.load(ends + i_o)
    i_end = tl.load(ends + i_o + 1)
    o_d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_sum = tl.zeros([BLOCK_D], dtype=tl.float32)
    size = tl.zeros([], dtype=tl.float32)
    for i_m in range(i_begin, i_end, BLOCK_M):
        o_m = i_m + tl.arange(0, BLOCK_M)
        m_m = o_m < i_end
        b_token = tl.load(members + o_m, mask=m_m, other=0)
        p_row = source + b_token[:, None] * stride_t + o_d.to(tl.int64)[None, :] * stride_d
        b_value = tl.load(p_row, mask=m_m[:, None] & m_d[None, :], other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_D]
        if WEIGHTED:
            b_weight = tl.load(weights + b_token * stride_w, mask=m_m, other=0.0)
            b_value = b_value * b_weight[:, None]
        else:
            b_weight = m_m.to(tl.float32)
        b_sum += tl.sum(b_value, 0)
        size += tl.sum(b_weight, 0)
    b_sum = b_sum / tl.where(size == 0.0, 1.0, size)
    tl.store(merged + i_o * D + o_d, b_sum.to(merged.dtype.element_ty), mask=m_d)
    if tl.program_id(1) == 0:
        tl.store(total + i_o, size)


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype}{' by size' if sized else ''}", _merge_scatter_triton,
        (Like(dtype, (2880, 4096)), Like(torch.int64, (2880,)), Like(torch.float32, (2880,)) if sized else None, 320, out),
    )
    for dtype, sized, out in (
        (torch.bfloat16, False, torch.bfloat16), (torch.bfloat16, True, torch.float32), (torch.float32, True, torch.float32)
    )
)  # fmt: skip
