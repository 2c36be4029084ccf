"""A tower over packed pictures with Expedite in plain loops, of square pictures."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from support.plain_methods.reduced_tower import PlainBlock
from support.plain_methods.tome_packed import attention_of, frames_of


@torch.no_grad()
def expedite_packed_tower(model: Any, pixels: Tensor, grid: Tensor, layer: int, reduce: Any) -> list[Tensor]:
    """Return the output of every block, a row a patch of the first block; `reduce` clusters a frame before block `layer`."""
    tower = model.model.visual
    given: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.append({"hidden": args[0], **kwargs})

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in tower.blocks]
    tower(pixels, grid_thw=grid)
    for handle in handles:
        handle.remove()

    unit, dim = tower.spatial_merge_size**2, given[0]["hidden"].shape[-1]
    frames = frames_of(tower, grid)
    values = {place: rows for place, rows in enumerate(given[0]["hidden"].split(unit))}
    reductions = []
    outputs = []
    for number, block in enumerate(tower.blocks):
        if number == layer:
            for frame in frames:
                rows = torch.stack([values[place].flatten() for place in frame])
                nothing = torch.zeros(0)
                made = reduce(PlainBlock(number, 0, rows, nothing, nothing, nothing, [], 0, False, False))
                places = [frame[place] for place in made.places]
                for place in frame:
                    del values[place]
                values.update({p: row.view(unit, dim) for p, row in zip(places, made.values, strict=True)})
                reductions.append((frame, places, made.back))
        bounds = (given[number]["cu_seqlens"] // unit).tolist()
        attended = {}
        for begin, end in pairwise(bounds):
            places = [place for place in values if begin <= place < end]
            if places:
                alone = {place: [place] for place in places}
                out, _ = attention_of(block, values, alone, places, given[number]["position_embeddings"], unit, False)
                attended.update({place: values[place] + change for place, change in zip(places, out, strict=True)})
        values = {place: rows + block.mlp(block.norm2(rows)) for place, rows in attended.items()}
        whole = dict(values)
        for frame, places, back in reductions:
            mixed = back @ torch.stack([values[place].flatten() for place in places])
            whole.update({place: row.view(unit, dim) for place, row in zip(frame, mixed, strict=True)})
        outputs.append(torch.cat([whole[place] for place in sorted(whole)]))
    return outputs
