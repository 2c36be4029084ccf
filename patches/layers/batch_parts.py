"""What a method is shown of a cut besides queries and keys: where tokens stand, and what was kept for it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from vlmprune.methods.layer_batch import EntryEmbeddings, LayerSignal, TextSpans

from .run import LayerRun


def batch_parts(
    run: LayerRun,
    layer: int,
    chosen: Sequence[int],
    hidden: Tensor,
    signals: Sequence[LayerSignal],
    final_norm: Callable[[Tensor], Tensor],
) -> dict[str, Any]:
    """Return the fields of a `LayerBatch` that are read of no layer.

    Args:
        run: the running call.
        layer: the layer that is cut.
        chosen: the images that are cut.
        hidden: the states that enter it, `[batch, width, dim]`.
        signals: what was read of the layers before.
        final_norm: the language model's.
    """
    images = run.cut_images
    alive = [images.columns[image] for image in chosen]
    rows = tuple(images.rows[image] for image in chosen)
    flat = torch.cat(alive)
    carried = [images.carried[image][images.place[image]] for image in chosen] if images.carried else None
    return {
        "counts": tuple(len(columns) for columns in alive),
        "budgets": tuple(images.schedule[image][layer] for image in chosen),
        "rows": rows,
        "images": tuple(chosen),
        "totals": tuple(images.totals[image] for image in chosen),
        "entered": tuple(len(images.entered[image]) for image in chosen),
        "layouts": tuple(images.layouts[image] for image in chosen),
        "indices": tuple(images.index[image] for image in chosen),
        "columns": tuple(
            columns - row * run.width
            for row, columns in zip(rows, run.current(flat).split([len(columns) for columns in alive]), strict=True)
        ),
        "text": _text(run, chosen),
        "hidden": hidden,
        "valid": run.present(),
        "signals": {signal: run.observed[signal].flatten()[flat] for signal in signals},
        "vision": {
            signal: torch.cat([parts[image][images.index[image]] for image in chosen])
            for signal, parts in images.vision.items()
        },
        "carried": None if carried is None else torch.cat(carried),
        "memory": run.memory,
        "read_entry": lambda: _entry(run, chosen),
        "final_norm": final_norm,
    }


def _text(run: LayerRun, chosen: Sequence[int]) -> tuple[TextSpans, ...]:
    """Return the text around the images, in the columns of the current sequence."""
    spans, rows = run.cut_images.spans, run.cut_images.rows
    parts = [part for image in chosen for part in spans[image]]
    now = iter(run.current(torch.cat(parts)).split([len(part) for part in parts]))
    return tuple(TextSpans(*(next(now) - rows[image] * run.width for _ in range(3))) for image in chosen)


def _entry(run: LayerRun, chosen: Sequence[int]) -> tuple[EntryEmbeddings, ...]:
    """Return what entered the language model of the images and of the text behind them."""
    images, embeddings = run.cut_images, run.embeddings
    assert embeddings is not None
    table = embeddings.detach().flatten(0, 1)
    return tuple(
        EntryEmbeddings(table[run.at_entry(images.entered[image])], table[run.at_entry(images.spans[image].after)])
        for image in chosen
    )
