"""PageRank on the attention graph: what the votes of attention settle at, without the attention matrices."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from vlmprune.kernels.shared.attention_columns import AttentionColumns, attention_bounds
from vlmprune.kernels.shared.compile_cases import CompileCase, Like
from vlmprune.kernels.shared.implementation import choose_implementation
from vlmprune.kernels.shared.segments import check_offsets

HEAD_REDUCTIONS = ("rms", "mean", "none")

# Upper size of the block of attention that the reference holds at a time.
BLOCK_BYTES = 64 * 2**20
# What of it stays in a processor's cache from round to round, and rows of a causal block there.
CACHED_BYTES, CAUSAL_ROWS = 2**22, 128


def attention_pagerank(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    iterations: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    seen: Tensor | None = None,
    start: Tensor | None = None,
    reduce_heads: str = "rms",
    max_seqlen: int | None = None,
    implementation: str | None = None,
) -> Tensor:
    """Return the votes of every token after `iterations` rounds: fp32 `[tokens]`, or `[tokens, heads]` unreduced.

    In each round a token shares out its votes by its row of `softmax(scale * q k^T)`, and has what it receives as votes in
    the next: `votes <- votes P` by head, as in AIM (arXiv 2412.03248) and Zero-TPrune (arXiv 2305.17328).

    Args:
        query: `[tokens, heads, head_dim]`, packed sequences, rotary positions already applied, any strides.
        key: `[tokens, kv_heads, head_dim]`; `heads` must be a multiple of `kv_heads` (grouped queries).
        cu_seqlens: `[sequences + 1]` bounds.
        iterations: number of rounds, 1 or more.
        scale: factor of the logits; None for `head_dim ** -0.5`. A temperature divides it.
        causal: a query sees keys up to itself.
        seen: bool `[tokens]`, keys that receive votes; the others still give theirs. None for all. The votes of a query
            that sees no key are lost.
        start: `[tokens]`, 0 or more, first votes up to a factor: they are divided by their sum over the sequence. None
            for equal ones.
        reduce_heads: "rms" (root of the mean square) or "mean" over heads, or "none".
        max_seqlen: the longest sequence, so that a `cu_seqlens` on the GPU needs no host sync; it is then not checked.
        implementation: forced "torch" or "triton"; None goes by the device.

    Raises:
        ValueError: a bad shape, bound, number of rounds or reduction.
        KernelUnavailableError: the forced implementation cannot run.
    """
    _check(query, key, seen, start, iterations, reduce_heads)
    scale = query.shape[-1] ** -0.5 if scale is None else float(scale)
    if choose_implementation(query.device, implementation) == "triton":
        votes = _attention_pagerank_triton(query, key, cu_seqlens, iterations, scale, causal, seen, start, max_seqlen)
    else:
        bounds = check_offsets(cu_seqlens, query.shape[0], "cu_seqlens")
        votes = attention_pagerank_reference(query, key, bounds, iterations, scale, causal, seen, start)
    if reduce_heads == "none":
        return votes.T.contiguous()
    return votes.square().mean(0).sqrt() if reduce_heads == "rms" else votes.mean(0)


def attention_pagerank_reference(
    query: Tensor,
    key: Tensor,
    bounds: Sequence[int],
    iterations: int,
    scale: float,
    causal: bool,
    seen: Tensor | None,
    start: Tensor | None,
) -> Tensor:
    """The votes by head, fp32 `[heads, tokens]`, for arguments that are already checked.

    Blocks are rows of some heads, causal ones without the keys behind their last row. Those of as many heads as stay in the cache
    are made once for all rounds; where the rows of one head are more than `BLOCK_BYTES` they are made again in each.
    """
    tokens, heads, _ = query.shape
    votes = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    group = heads // max(1, key.shape[1])
    cached = CACHED_BYTES if query.device.type == "cpu" else BLOCK_BYTES
    for begin, end in pairwise(bounds):
        length = end - begin
        if length == 0:
            continue
        first = query.new_ones(length, dtype=torch.float32) if start is None else start[begin:end].to(torch.float32)
        mask = None if seen is None else seen[begin:end]
        together = min(heads, max(1, cached // (4 * length**2)))
        rows = min(length, max(1, BLOCK_BYTES // (4 * length)))
        whole = rows == length
        if whole and causal:
            rows = min(length, CAUSAL_ROWS)
        parts = [(row, min(row + rows, length)) for row in range(0, length, rows)]
        for head in range(0, heads, together):
            some = range(head, min(head + together, heads))
            queries = query[begin:end, some.start : some.stop].transpose(0, 1).to(torch.float32) * scale
            keys = key[begin:end, [h // group for h in some]].permute(1, 2, 0).to(torch.float32)
            current = (first / first.sum()).expand(len(some), 1, length)
            held = [_rows(queries, keys, *part, causal, mask) for part in parts] if whole else None
            for _ in range(iterations):
                received = current.new_zeros(len(some), 1, length)
                for index, part in enumerate(parts):
                    block = _rows(queries, keys, *part, causal, mask) if held is None else held[index]
                    received[..., : block.shape[2]] += current[..., slice(*part)] @ block
                current = received
            votes[some.start : some.stop, begin:end] = current[:, 0]
    return votes


def _rows(queries: Tensor, keys: Tensor, first: int, last: int, causal: bool, mask: Tensor | None) -> Tensor:
    """Rows `first` to `last` of the attention of some heads, 0 where nothing is seen: `[heads, rows, keys]`.

    Causal ones have the keys before `last` alone, others have all.
    """
    ends = last if causal else keys.shape[2]
    scores = queries[:, first:last] @ keys[..., :ends]
    if causal:
        later = torch.ones(last - first, last - first, dtype=torch.bool, device=keys.device).triu_(1)
        scores[..., first:].masked_fill_(later, -torch.inf)
    if mask is None:
        return scores.softmax(-1)
    return scores.masked_fill_(~mask[:ends], -torch.inf).softmax(-1).nan_to_num_(nan=0.0)


def _attention_pagerank_triton(
    query: Tensor,
    key: Tensor,
    cu_seqlens: Sequence[int] | Tensor,
    iterations: int,
    scale: float,
    causal: bool,
    seen: Tensor | None,
    start: Tensor | None,
    max_seqlen: int | None,
) -> Tensor:
    """One launch for the rows' denominators, and one a round."""
    tokens, heads, _ = query.shape
    bounds, longest = attention_bounds(cu_seqlens, max_seqlen, query)
    votes = torch.empty(heads, tokens, dtype=torch.float32, device=query.device)
    if not (tokens and heads and longest):
        return votes
    first = query.new_ones(tokens, dtype=torch.float32) if start is None else start.to(torch.float32)
    # The sum over each token's sequence.
    sequence = torch.searchsorted(bounds, torch.arange(tokens, device=query.device), right=True) - 1
    total = first.new_zeros(bounds.numel()).scatter_add_(0, sequence, first)
    votes.copy_((first / total[sequence]).expand_as(votes))
    columns, received = AttentionColumns(query, key, bounds, longest, scale, causal, seen), torch.empty_like(votes)
    for _ in range(iterations):
        columns.sums(received, (1, tokens), votes=votes)
        votes, received = received, votes
    return votes


def _check(
    query: Tensor, key: Tensor, seen: Tensor | None, start: Tensor | None, iterations: int, reduce_heads: str
) -> None:
    if reduce_heads not in HEAD_REDUCTIONS:
        raise ValueError(f"reduce_heads={reduce_heads!r} is not one of {', '.join(HEAD_REDUCTIONS)}.")
    if iterations < 1:
        raise ValueError(f"iterations={iterations} must be 1 or more.")
    if query.dim() != 3 or key.dim() != 3:
        raise ValueError(
            "query must be [tokens, heads, head_dim] and key [tokens, kv_heads, head_dim]; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    if query.shape[0] != key.shape[0] or query.shape[2] != key.shape[2] or query.shape[1] % max(key.shape[1], 1):
        raise ValueError(
            "query and key must agree in tokens and head_dim, and heads must be a multiple of kv_heads; "
            f"got {tuple(query.shape)} and {tuple(key.shape)}."
        )
    tokens = query.shape[0]
    if seen is not None and (seen.shape != (tokens,) or seen.dtype != torch.bool):
        raise ValueError(f"seen must be bool [{tokens}]; got {seen.dtype} {tuple(seen.shape)}.")
    if start is not None and start.shape != (tokens,):
        raise ValueError(f"start must be [{tokens}]; got {tuple(start.shape)}.")


COMPILE_CASES = tuple(
    CompileCase(
        f"{dtype} {head_dim}{' causal, masked' if causal else ''}", _attention_pagerank_triton,
        (
            Like(dtype, (2880, 16, head_dim)), Like(dtype, (2880, 4, head_dim)), [0, 2880], 1, 0.1, causal,
            Like(torch.bool, (2880,)) if causal else None, None, None,
        ),
    )
    for dtype, head_dim, causal in ((torch.bfloat16, 64, False), (torch.bfloat16, 128, True), (torch.float32, 128, True))
)  # fmt: skip
