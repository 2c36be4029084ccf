"""Visual tokens that the caller merged into the embeddings, where a mask says which they are."""

from __future__ import annotations

import warnings
from itertools import chain

import torch
from torch import Tensor

from vlmprune.errors import LayoutError, UnsupportedCallError, VlmpruneWarning
from vlmprune.layout import unknown_layout
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import (
    CLS_TOKEN,
    GRID,
    TILES,
    TOWER_ATTENTION,
    TOWER_FEATURES,
    VIDEOS,
    WHOLE_TILES,
    ordered,
)

from ..calls import LanguageModelCall
from .image_spans import ImageSpans
from .visuals import PrefillVisuals

_OF_THE_IMAGE = frozenset({TOWER_ATTENTION, TOWER_FEATURES, CLS_TOKEN, GRID, WHOLE_TILES, TILES, VIDEOS})


def checked_mask(mask: object) -> Tensor:
    """Return the mask on the CPU, bool or int64.

    Raises:
        LayoutError: no bool or int tensor `[batch, tokens]`, or negative numbers in it.
    """
    allowed = "a bool or int tensor [batch, tokens], 0 at text"
    if not isinstance(mask, Tensor):
        raise LayoutError(f"visual_mask is of type {type(mask).__name__}; allowed: {allowed}.")
    if mask.ndim != 2 or mask.is_floating_point() or mask.is_complex():
        raise LayoutError(f"visual_mask is a {mask.dtype} tensor of shape {list(mask.shape)}; allowed: {allowed}.")
    mask = mask.detach().cpu()
    if mask.dtype != torch.bool:
        mask = mask.long()
        if bool((mask < 0).any()):
            raise LayoutError(f"visual_mask holds {int(mask.min())}; allowed: {allowed}.")
    return mask


def given_visuals(call: LanguageModelCall, mask: Tensor) -> PrefillVisuals | None:
    """Return the images that `mask` tells of, whose geometry nobody knows; None where this call has none.

    The model call around it then knows where they are.

    Args:
        call: the call in the caller's columns.
        mask: from `checked_mask`; its rows are repeated for beams and return sequences.

    Raises:
        LayoutError: the mask is of another shape than a call that begins a sequence.
        UnsupportedCallError: the call brings images of its own.
    """
    rows, columns = mask.shape
    times, rest = divmod(call.batch, max(rows, 1))
    if columns != call.columns and call.past:
        return None
    if columns != call.columns or rest or not times:
        raise LayoutError(
            f"visual_mask is for {rows} x {columns} tokens, the call has {call.batch} x {call.columns}; allowed: as many "
            "columns, and as many rows or a divisor of them (beams and return sequences)."
        )
    if call.model_call.has_visuals:
        raise UnsupportedCallError(
            "visual_mask is set, and the call brings images, whose places are known; leave one of them out."
        )
    if not bool(mask.any()):
        return None
    if call.arguments.get("inputs_embeds") is None:
        raise UnsupportedCallError(
            "visual_mask is set, and the language model was given token ids; pass inputs_embeds."
        )
    images = list(chain.from_iterable(((row, places) for places in _images(mask[row])) for row in range(rows)))
    repeated = [
        (row * times + copy, image, places) for copy in range(times) for image, (row, places) in enumerate(images)
    ]
    repeated.sort(key=lambda entry: (entry[0], entry[1]))
    spans = ImageSpans(
        counts=tuple(len(places) for _, _, places in repeated),
        rows=tuple(row for row, _, _ in repeated),
        unique=tuple(image for _, image, _ in repeated),
        flat=torch.cat([row * columns + places for row, _, places in repeated]),
    )
    visual = torch.zeros(call.batch * columns, dtype=torch.bool)
    visual[spans.flat] = True
    call.model_call.visual_mask = visual.view(call.batch, columns)
    call.model_call.read_mask(call.mask)
    return PrefillVisuals((), spans, tuple(unknown_layout(len(places)) for _, places in images))


def warn_of_embeddings(name: str) -> None:
    """Warn that a call brought embeddings and no images, so that the method `name` had nothing to prune."""
    warnings.warn(
        f"{name!r} is applied, and a call brought embeddings but no images: nothing was pruned. If visual "
        "tokens are among them, say where: `with vlmprune.options(model, visual_mask=...)`. This is said once.",
        VlmpruneWarning,
        stacklevel=2,
    )


def check_needs_no_tower(method: InputMethod, tower: TowerFacts) -> None:
    """Raise UnsupportedCallError if a method asks for more than the visual tokens themselves."""
    needs = [need.sentence for need in ordered(method.needs) if need in _OF_THE_IMAGE]
    if method.vision_signals(tower) and not needs:
        needs = [TOWER_ATTENTION.sentence]
    if needs:
        raise UnsupportedCallError(
            f"{method.name!r} needs {' and '.join(needs)}, which nobody knows of features that were merged by hand. Pass the "
            "pixels, or apply a method that looks at the tokens alone (divprune, say)."
        )


def _images(row: Tensor) -> list[Tensor]:
    """Return the columns of each image in a row, int64, images by their first column."""
    if row.dtype == torch.bool:
        starts = row & ~torch.cat([row.new_zeros(1), row[:-1]])
        row = starts.cumsum(0) * row
    columns = row.nonzero().flatten()
    numbers = row[columns]
    firsts = sorted(int(columns[numbers == number][0]) for number in numbers.unique())
    return [columns[numbers == row[first]] for first in firsts]
