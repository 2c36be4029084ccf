"""The words behind every image of a cut, for methods that score by the attention they pay."""

from __future__ import annotations

from torch import Tensor

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.layer_method import LayerBatch


def text_behind(batch: LayerBatch, method: str) -> list[Tensor]:
    """Return the columns of the text behind each image of a batch, int64.

    Args:
        batch: the cut.
        method: the name of the method that asks.

    Raises:
        UnsupportedCallError: nothing follows an image.
    """
    spans = [text.after for text in batch.text]
    for row, image, span in zip(batch.rows, batch.images, spans, strict=True):
        if not len(span):
            raise UnsupportedCallError(
                f"No text follows image {image} of the prompt (row {row}), and {method!r} scores by the text behind an image; "
                "allowed: a question behind it, or a method that needs none ('fastv', or any before the language model)."
            )
    return spans
