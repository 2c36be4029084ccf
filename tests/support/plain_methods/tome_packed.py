"""A tower over packed pictures with ToMe in plain loops: one visual token after the other, windows by membership."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor


@torch.no_grad()
def tome_packed_tower(
    model: Any, pixels: Tensor, grid: Tensor, plans: Sequence[Sequence[int]], proportional: bool
) -> Any:
    """Return the output of every block, a row a patch of the first block.

    Args:
        model: the unpatched model.
        pixels: patches of all pictures.
        grid: frames, rows, columns of each.
        plans: for each frame how many visual tokens each block removes.
        proportional: whether a token counts as often as its size says.
    """
    tower = model.model.visual
    given: list[dict[str, Any]] = []

    def note(module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        given.append({"hidden": args[0], **kwargs})

    handles = [block.register_forward_pre_hook(note, with_kwargs=True) for block in tower.blocks]
    tower(pixels, grid_thw=grid)
    for handle in handles:
        handle.remove()

    unit = tower.spatial_merge_size**2
    # In the order in which ToMe leaves the tokens of each frame, which decides who is compared with whom next.
    frames = frames_of(tower, grid)
    values = {place: rows for place, rows in enumerate(given[0]["hidden"].split(unit))}
    members = {place: [place] for place in values}
    outputs = []
    for number, block in enumerate(tower.blocks):
        arguments = given[number]
        bounds = (arguments["cu_seqlens"] // unit).tolist()
        keys = {}
        attended = dict(values)
        for begin, end in pairwise(bounds):
            places = [place for place in values if begin <= place < end]
            if places:
                out, own = attention_of(
                    block, values, members, places, arguments["position_embeddings"], unit, proportional
                )
                for place, change, key in zip(places, out, own, strict=True):
                    attended[place] = values[place] + change
                    keys[place] = key
        values = attended
        for frame, plan in zip(frames, plans, strict=True):
            frame[:] = _merged(values, members, keys, frame, plan[number])
        values = {place: rows + block.mlp(block.norm2(rows)) for place, rows in values.items()}
        found = {member: values[place] for place, group in members.items() for member in group}
        outputs.append(torch.cat([found[place] for place in sorted(found)]))
    return outputs


def frames_of(tower: Any, grid: Tensor) -> list[list[int]]:
    """The visual tokens of each frame in raster order, each by its place in the tower's sequence."""
    from transformers.vision_utils import get_vision_window_index

    merge = tower.spatial_merge_size
    sizes = [int(h) * int(w) // merge**2 for t, h, w in grid.tolist() for _ in range(t)]
    places = list(range(sum(sizes)))
    if getattr(tower, "fullatt_block_indexes", None) is not None:
        order = get_vision_window_index(grid, merge, tower.window_size, tower.patch_size)[0].tolist()
        places = [order.index(token) for token in places]
    return [list(part) for part in _split(places, sizes)]


def _split(items: list[int], sizes: list[int]) -> list[list[int]]:
    parts, start = [], 0
    for size in sizes:
        parts.append(items[start : start + size])
        start += size
    return parts


def attention_of(
    block: Any,
    values: dict[int, Tensor],
    members: dict[int, list[int]],
    places: list[int],
    tables: tuple[Tensor, Tensor],
    unit: int,
    proportional: bool,
) -> tuple[list[Tensor], list[Tensor]]:
    module = block.attn
    rotate = sys.modules[type(module).__module__].apply_rotary_pos_emb_vision
    rows = torch.cat([values[place] for place in places])
    patches = torch.cat([torch.arange(unit) + unit * place for place in places])
    query, key, value = module.qkv(block.norm1(rows)).view(len(rows), 3, module.num_heads, -1).unbind(1)
    sizes = torch.tensor([float(len(members[place])) for place in places]).repeat_interleave(unit)
    turned_query, turned_key = rotate(query, key, tables[0][patches], tables[1][patches])
    heads = []
    for head in range(module.num_heads):
        weights = (turned_query[:, head] @ turned_key[:, head].T * module.scaling).exp()
        if proportional:
            weights = weights * sizes
        heads.append(weights / weights.sum(1, keepdim=True) @ value[:, head])
    out = module.proj(torch.cat(heads, -1))
    return list(out.split(unit)), [part.mean((0, 1)) for part in key.split(unit)]


def _merged(
    values: dict[int, Tensor],
    members: dict[int, list[int]],
    keys: dict[int, Tensor],
    order: list[int],
    number: int,
) -> list[int]:
    if not number:
        return order
    first, second = order[0::2], order[1::2]
    best = {}
    for place in first:
        cosines = [float(torch.cosine_similarity(keys[place], keys[other], dim=0)) for other in second]
        best[place] = (max(cosines), second[cosines.index(max(cosines))])
    ranked = sorted(first, key=lambda place: (-best[place][0], first.index(place)))
    leaving, staying = ranked[:number], ranked[number:]
    merged = {}
    for place in second:
        group = [place, *(source for source in first if source in leaving and best[source][1] == place)]
        weights = [len(members[other]) for other in group]
        total = sum(weight * values[other] for weight, other in zip(weights, group, strict=True))
        merged[place] = (total / sum(weights), [member for other in group for member in members[other]])
    for place, (rows, group) in merged.items():
        values[place], members[place] = rows, group
    for place in leaving:
        del values[place], members[place]
    return staying + second
