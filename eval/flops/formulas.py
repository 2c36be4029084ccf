"""What papers print as FLOPs, to put beside our own counts."""

from __future__ import annotations

from collections.abc import Sequence


def equivalent_tokens(visual_tokens: Sequence[int]) -> float:
    """Visual tokens averaged over layers, which compares methods that drop inside the LLM with those before it."""
    return sum(visual_tokens) / len(visual_tokens)


def fastv_formula(tokens: Sequence[int], hidden: int, ffn: int) -> int:
    """FastV's "FLOPs" (arXiv 2403.06764): `4nd^2 + 2n^2d + 2ndm` a layer. They are MACs, without a gate."""
    return sum(4 * n * hidden**2 + 2 * n * n * hidden + 2 * n * hidden * ffn for n in tokens)


def pyramiddrop_formula(tokens: Sequence[int], hidden: int, ffn: int) -> int:
    """PyramidDrop's "FLOPs" (arXiv 2410.17247): `4nd^2 + 2n^2d + 3ndm` a layer. They are MACs, with a gate."""
    return sum(4 * n * hidden**2 + 2 * n * n * hidden + 3 * n * hidden * ffn for n in tokens)
