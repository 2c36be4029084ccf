"""Which columns of a row are the text before, between and after its images."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from vlmprune.methods.layer_batch import TextSpans

from ..calls import LanguageModelCall


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


def padding_before(call: LanguageModelCall) -> Tensor | None:
    """Return by how much position ids count the padding before each row's first token, int64 `[batch]`; None if they do not.

    `generate` makes position ids from the mask; in a plain forward of a model with 1-D positions the host counts columns.
    """
    mask = call.model_call.attention_mask
    if mask is None or call.positions.ndim == 3 or call.model_call.inputs.get("position_ids") is not None:
        return None
    before = (mask.cumsum(1) == 0).sum(1)
    return before.to(call.device, non_blocking=True) if bool(before.any()) else None
