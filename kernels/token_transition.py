"""How far a module turns and stretches every token: lengths and angle of what goes in and what comes out."""

from __future__ import annotations

import torch
from torch import Tensor

from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation, tl, triton

# Elements of one of the two tensors that the reference widens at a time.
BLOCK_ELEMENTS = 2**20

# Tokens and channels a step of the kernel.
STEP_TOKENS, STEP_DIM = 4, 512


def token_transition(entering: Tensor, leaving: Tensor, *, implementation: str | None = None) -> tuple[Tensor, Tensor]:
    """Return `|leaving| / |entering|` and the cosine of the two, fp32 `[tokens]` each, as TransPrune (arXiv 2507.20630) asks.

    Each tensor is read once. A token that enters as zero has ratio 0, and one that enters or leaves as zero cosine 0.

    Args:
        entering: `[tokens, dim]` floating point, any strides.
        leaving: `[tokens, dim]`, of any floating dtype.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: the shapes are not `[tokens, dim]` or differ.
        KernelUnavailableError: the forced implementation cannot run.
    """
    if entering.dim() != 2 or entering.shape != leaving.shape:
        raise ValueError(
            "entering and leaving must be [tokens, dim] of one shape; "
            f"got {tuple(entering.shape)} and {tuple(leaving.shape)}."
        )
    if choose_implementation(entering.device, implementation) == "triton":
        return _token_transition_triton(entering, leaving)
    return token_transition_reference(entering, leaving)


def token_transition_reference(entering: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    """`token_transition` in plain torch and fp32, for arguments that are already checked."""
    tokens, dim = entering.shape
    ratio = torch.empty(tokens, dtype=torch.float32, device=entering.device)
    cosine = torch.empty_like(ratio)
    block = max(1, BLOCK_ELEMENTS // max(1, dim))
    for begin in range(0, tokens, block):
        part = slice(begin, begin + block)
        before, after = entering[part].to(torch.float32), leaving[part].to(torch.float32)
        length, reached = torch.linalg.vector_norm(before, dim=1), torch.linalg.vector_norm(after, dim=1)
        product = torch.einsum("td,td->t", before, after)
        ratio[part] = torch.where(length > 0, reached / length, 0.0)
        # One after the other: the product of two small lengths may vanish.
        cosine[part] = torch.where((length > 0) & (reached > 0), product / length / reached, 0.0)
    return ratio, cosine


def _token_transition_triton(entering: Tensor, leaving: Tensor) -> tuple[Tensor, Tensor]:
    tokens, dim = entering.shape
    ratio = torch.empty(tokens, dtype=torch.float32, device=entering.device)
    cosine = torch.empty_like(ratio)
    if tokens == 0:
        return ratio, cosine
    _transition_kernel[(triton.cdiv(tokens, STEP_TOKENS),)](
        *(entering, *entering.stride(), leaving, *leaving.stride(), ratio, cosine, tokens, dim),
        BLOCK_T=STEP_TOKENS, BLOCK_D=min(STEP_DIM, max(16, triton.next_power_of_2(dim))), num_warps=4,
    )  # fmt: skip
    return ratio, cosine


@triton.jit
def _transition_kernel(
    entering,
    stride_et,
    stride_ed,
    leaving,
    stride_lt,
    stride_ld,
    ratio,
    cosine,
    T,
    D,
    BLOCK_T: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Squared lengths and product of a few tokens, channels a block at a time."""
    o_t = tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < T
    b_before = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_after = tl.zeros([BLOCK_T], dtype=tl.float32)
    b_product = tl.zeros([BLOCK_T], dtype=tl.float32)
    for i_d in range(0, D, BLOCK_D):
        o_d = (i_d + tl.arange(0, BLOCK_D)).to(tl.int64)
        m_tile = m_t[:, None] & (o_d < D)[None, :]
        p_before = entering + o_t[:, None] * stride_et + o_d[None, :] * stride_ed
        p_after = leaving + o_t[:, None] * stride_lt + o_d[None, :] * stride_ld
        b_in = tl.load(p_before, mask=m_tile, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_D]
        b_out = tl.load(p_after, mask=m_tile, other=0.0).to(tl.float32)
        b_before += tl.sum(b_in * b_in, 1)
        b_after += tl.sum(b_out * b_out, 1)
        b_product += tl.sum(b_in * b_out, 1)
    b_length = tl.sqrt(b_before)
    b_reached = tl.sqrt(b_after)
    m_in = b_length > 0.0
    m_both = m_in & (b_reached > 0.0)
    b_length = tl.where(m_in, b_length, 1.0)
    tl.store(ratio + o_t, tl.where(m_in, b_reached / b_length, 0.0), mask=m_t)
    b_cosine = b_product / b_length / tl.where(m_both, b_reached, 1.0)
    tl.store(cosine + o_t, tl.where(m_both, b_cosine, 0.0), mask=m_t)


COMPILE_CASES = tuple(
    CompileCase(f"{dtype}", _token_transition_triton, (Like(dtype, (2928, 4096)), Like(dtype, (2928, 4096))))
    for dtype in (torch.bfloat16, torch.float32)
)
