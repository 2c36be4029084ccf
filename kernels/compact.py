"""Gather the kept tokens of several tensors (embeddings, masks, positions, deepstack planes) into a padded batch."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton

# Tokens and elements of a token that one program copies.
BLOCK_TOKENS, BLOCK_ELEMENTS = 8, 512

_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def compact(
    planes: Sequence[Tensor],
    index: Tensor,
    *,
    fills: Sequence[float | int | bool] | None = None,
    dims: Sequence[int] | None = None,
    implementation: str | None = None,
) -> list[Tensor]:
    """Return `plane[b, index[b, m]]` of every plane: `[batch, kept, ...]` from `[batch, length, ...]`, all in one launch.

    Args:
        planes: tensors of any dtype up to 8 bytes an element and any strides, copied to the bit.
        index: int64 `[batch, kept]`, the token of each slot, -1 for a padding slot. On a GPU an index beyond the length
            is not checked and makes a padding slot.
        fills: what padding slots hold, one number per plane; None for 0.
        dims: where the batch dimension of each plane is, with the length right after it; None for 0. M-RoPE positions
            `[3, batch, length]` have 1.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape or dtype, or a wrong number of fills or dims.
        IndexError: an index outside -1..length - 1 (torch only).
        KernelUnavailableError: the forced implementation cannot run.
    """
    fills = [0] * len(planes) if fills is None else list(fills)
    dims = [0] * len(planes) if dims is None else list(dims)
    _check(planes, index, fills, dims)
    if not planes:
        return []
    if choose_implementation(index.device, implementation) == "triton":
        return _compact_triton(planes, index, fills, dims)
    return compact_reference(planes, index, fills, dims)


def compact_reference(
    planes: Sequence[Tensor], index: Tensor, fills: Sequence[float | int | bool], dims: Sequence[int]
) -> list[Tensor]:
    """`compact` in plain torch, for arguments that are already checked, except the index."""
    low, high = (int(bound) for bound in index.aminmax()) if index.numel() else (0, -1)
    padding = index < 0 if low < 0 else None
    slots = index if padding is None else index.clamp(min=0)
    images = torch.arange(index.shape[0], device=index.device)[:, None]
    flat: dict[int, Tensor] = {}
    results = []
    for plane, fill, dim in zip(planes, fills, dims, strict=True):
        length = plane.shape[dim + 1]
        if low < -1 or high >= length:
            raise IndexError(f"index must lie in -1..{length - 1}; got {low}..{high}.")
        if length and plane.is_contiguous():
            if length not in flat:
                flat[length] = (slots + images * length).flatten()
            taken = plane.flatten(dim, dim + 1).index_select(dim, flat[length]).unflatten(dim, index.shape)
        else:
            first = plane.movedim((dim, dim + 1), (0, 1))
            rows = first[images, slots] if length else plane.new_empty(*index.shape, *first.shape[2:])
            taken = rows.movedim((0, 1), (dim, dim + 1)).contiguous()
        if padding is not None:
            mask = padding.view(*[1] * dim, *padding.shape, *[1] * (plane.dim() - dim - 2))
            taken = taken.masked_fill(mask, torch.tensor(fill, device=plane.device).to(plane.dtype))
        results.append(taken)
    return results


def _compact_triton(
    planes: Sequence[Tensor], index: Tensor, fills: Sequence[float | int | bool], dims: Sequence[int]
) -> list[Tensor]:
    device = index.device
    batch, kept = index.shape
    results, sources, targets, layouts, bits, blocks = [], [], [], [], [], []
    for plane, fill, dim in zip(planes, fills, dims, strict=True):
        results.append(
            torch.empty(*plane.shape[:dim], batch, kept, *plane.shape[dim + 2 :], dtype=plane.dtype, device=device)
        )
        # As integers of the same width, so that every dtype and every NaN is copied as it is.
        word = _BITS[plane.element_size()]
        source = plane.view(word)
        # [outer, batch, length, inner]
        outer, inner = math.prod(plane.shape[:dim]), math.prod(plane.shape[dim + 2 :])
        source = source.reshape(outer, *plane.shape[dim : dim + 2], inner)
        sources.append(source)
        targets.append(results[-1].view(word))
        layouts.append((source.shape[2], inner, *source.stride()))
        bits.append(int(torch.tensor([fill]).to(plane.dtype).view(word)))
        blocks.append(outer * triton.cdiv(inner, BLOCK_ELEMENTS))
    if batch * kept == 0 or sum(blocks) == 0:
        return results
    ends = [sum(blocks[: i + 1]) for i in range(len(blocks))]
    index = index.contiguous()
    _compact_kernel[(triton.cdiv(kept, BLOCK_TOKENS), sum(blocks), batch)](
        *(tuple(sources), tuple(targets), tuple(layouts), tuple(bits), tuple(ends), index, batch, kept),
        PLANES=len(planes), BLOCK_M=BLOCK_TOKENS, BLOCK_W=BLOCK_ELEMENTS, num_warps=4,
    )  # fmt: skip
    return results


@triton.jit
def _compact_kernel(
    sources,
    targets,
    layouts,
    fills,
    ends,
    index,
    B,
    M,
    PLANES: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_W: tl.constexpr,
):
    """The second grid axis runs through the planes: a program copies some tokens of one plane, whatever its dtype."""
    i_w = tl.program_id(1)
    i_b = tl.program_id(2).to(tl.int64)
    o_m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    m_m = o_m < M
    b_index = tl.load(index + i_b * M + o_m, mask=m_m, other=-1)
    for i_p in tl.static_range(PLANES):
        length, inner, stride_o, stride_b, stride_l, stride_i = layouts[i_p]
        begin = 0
        if i_p > 0:
            begin = ends[i_p - 1]
        if (i_w >= begin) & (i_w < ends[i_p]):
            blocks = (inner + BLOCK_W - 1) // BLOCK_W
            i_o = ((i_w - begin) // blocks).to(tl.int64)
            o_i = (i_w - begin) % blocks * BLOCK_W + tl.arange(0, BLOCK_W)
            m_copy = (b_index >= 0) & (b_index < length)
            m_i = o_i < inner
            p_source = sources[i_p] + i_o * stride_o + i_b * stride_b + b_index[:, None] * stride_l
            p_target = targets[i_p] + ((i_o * B + i_b) * M + o_m[:, None]) * inner
            b_value = tl.load(
                p_source + o_i.to(tl.int64)[None, :] * stride_i, mask=m_copy[:, None] & m_i[None, :], other=0
            )
            b_fill = tl.full([BLOCK_M, BLOCK_W], fills[i_p], b_value.dtype)
            b_value = tl.where(m_copy[:, None], b_value, b_fill)
            tl.store(p_target + o_i[None, :], b_value, mask=m_m[:, None] & m_i[None, :])


def _check(planes: Sequence[Tensor], index: Tensor, fills: Sequence[float | int | bool], dims: Sequence[int]) -> None:
    if index.dim() != 2 or index.dtype != torch.int64:
        raise ValueError(f"index must be int64 [batch, kept]; got {index.dtype} {tuple(index.shape)}.")
    if len(fills) != len(planes) or len(dims) != len(planes):
        raise ValueError(
            f"fills and dims must have one entry per plane ({len(planes)}); got {len(fills)}, {len(dims)}."
        )
    for number, (plane, dim) in enumerate(zip(planes, dims, strict=True)):
        if not 0 <= dim <= plane.dim() - 2 or plane.shape[dim] != index.shape[0]:
            raise ValueError(
                f"planes[{number}] must have the batch of index ({index.shape[0]}) in dimension {dim} and the length after "
                f"it; got shape {tuple(plane.shape)}."
            )
        if plane.element_size() not in _BITS or plane.is_complex():
            raise ValueError(f"planes[{number}] has dtype {plane.dtype}, which has more than 8 bytes or is complex.")


COMPILE_CASES = (
    CompileCase(
        "embeddings, mask, positions", _compact_triton,
        (
            [
                Like(torch.bfloat16, (2, 700, 4096)), Like(torch.int64, (2, 700)), Like(torch.int64, (3, 2, 700)),
                Like(torch.bool, (2, 700), strided=True), Like(torch.float32, (2, 700, 4096)),
            ],
            Like(torch.int64, (2, 320)), [0, 0, 1, False, 0.0], [0, 0, 1, 0, 0],
        ),
    ),
)  # fmt: skip
