"""Which columns of a row are the text before, between and after its images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmprune.methods.layer_batch import TextSpans


def find_text_spans(text: Tensor, rows: Sequence[int], columns: Sequence[Tensor]) -> list[TextSpans]:
    """Return the text around each image.

    Args:
        text: bool `[batch, columns]` on the CPU, valid tokens that are not visual, drafts left out.
        rows: batch row per image.
        columns: per image the flat columns of its visual tokens in prompt order, on the CPU.

    Returns:
        Per image flat columns `row * columns + column`, int64 on the CPU.
    """
    width = text.shape[1]
    extents = [(int(places.min()), int(places.max())) for places in columns]
    spans = []
    for row, (first, last) in zip(rows, extents, strict=True):
        words = text[row].nonzero().flatten() + row * width
        previous = max(
            (end for other, (_, end) in enumerate(extents) if rows[other] == row and end < first), default=-1
        )
        following = min(
            (begin for other, (begin, _) in enumerate(extents) if rows[other] == row and begin > last),
            default=(row + 1) * width,
        )
        spans.append(
            TextSpans(
                before=words[(words > previous) & (words < first)],
                next=words[(words > last) & (words < following)],
                after=words[words > last],
            )
        )
    return spans
