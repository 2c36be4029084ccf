"""Visual tokens merged by hand."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from support.host_parts import decoder
from support.layerwise import alive_columns, placeholders


def given_merged(given: dict[str, Any], inputs: dict[str, Tensor], record: Any, token: int) -> dict[str, Any]:
    """Return what the host hands to its language model, with the kept visual tokens merged.

    Args:
        given: what an unpatched model hands to its language model.
        inputs: the model inputs of the batch.
        record: what was kept.
        token: id of the placeholder.
    """
    visual, embeddings = inputs["input_ids"] == token, given["inputs_embeds"]
    deep = [torch.zeros_like(embeddings) for _ in given.get("deepstack_visual_embeds") or ()]
    for plane, features in zip(deep, given.get("deepstack_visual_embeds") or (), strict=True):
        plane[visual] = features
    return {
        **given,
        "inputs_embeds": merged_by_hand(embeddings, inputs, record, token),
        "deepstack_visual_embeds": [merged_by_hand(plane, inputs, record, token)[visual] for plane in deep],
    }


def merged_by_hand(embeddings: Tensor, inputs: dict[str, Tensor], record: Any, image_token: int) -> Tensor:
    """Replace the kept tokens by what the method of the record merges into them."""
    merged, combine = embeddings.clone(), COMBINED[record.method]
    for row in range(len(embeddings)):
        placeholders, start = (inputs["input_ids"][row] == image_token).nonzero().flatten(), 0
        for image in (image for image in record.images if image.batch_index == row):
            mine = placeholders[start : start + image.total]
            for number, token in enumerate(image.stages[0][1].tolist()):
                merged[row, mine[token]] = combine(embeddings[row, mine], image, number)
            start += image.total
    return merged


def cell_average(values: Tensor, image: Any, number: int) -> Tensor:
    """The average of a cell of the grid."""
    grid = values.view(*image.grid, -1)
    cell_rows = (image.kept // image.grid[1]).unique().numel()
    cell_columns = image.kept.numel() // cell_rows
    top, left = divmod(number, cell_columns)
    spans = [
        slice(index * size // cells, -(-(index + 1) * size // cells))
        for index, size, cells in ((top, image.grid[0], cell_rows), (left, image.grid[1], cell_columns))
    ]
    return grid[spans[0], spans[1]].flatten(0, 1).mean(0)


def target_plus_mean(values: Tensor, image: Any, number: int) -> Tensor:
    """A kept token plus the mean of those that the groups say went into it."""
    target = int(image.stages[0][1][number])
    members = [token for token in (image.groups == number).nonzero().flatten().tolist() if token != target]
    return values[target] + (values[members].mean(0) if members else 0)


@contextmanager
def entering(model: Any) -> Iterator[list[dict[str, Any]]]:
    """Note what enters the language model behind the hooks of an applied method."""
    seen: list[dict[str, Any]] = []
    handle = decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs), with_kwargs=True
    )
    try:
        yield seen
    finally:
        handle.remove()


def given_as_entered(
    model: Any, given: dict[str, Any], entered: dict[str, Any], inputs: dict[str, Tensor], record: Any
) -> dict[str, Any]:
    """Return what the host hands to its language model, with the kept visual tokens as they entered the pruned one.

    For methods whose merging is compared with plain loops elsewhere, and cannot be told from groups.
    """
    embeddings, width = given["inputs_embeds"].clone(), entered["inputs_embeds"].shape[1]
    kept = torch.zeros_like(embeddings[..., 0], dtype=torch.bool)
    for row in range(len(embeddings)):
        columns = alive_columns(model, inputs, record, row, 0)
        embeddings[row, columns] = entered["inputs_embeds"][row, width - len(columns) :]
        kept[row, columns] = True
    deep = given.get("deepstack_visual_embeds") or []
    if not deep:
        return {**given, "inputs_embeds": embeddings}
    kept = kept[placeholders(model, inputs["input_ids"])]
    planes = entered["deepstack_visual_embeds"]
    whole = [
        features.index_copy(0, kept.nonzero().flatten(), those) for features, those in zip(deep, planes, strict=False)
    ]
    # Planes of layers behind a cut are not handed over; they are not merged before it.
    deep = [*whole, *deep[len(whole) :]]
    return {**given, "inputs_embeds": embeddings, "deepstack_visual_embeds": deep}


# How merging methods, with the parameters of the matrix, make one token of several, by name.
COMBINED = {"pool": cell_average, "visionzip": target_plus_mean, "visiondrop": target_plus_mean}
