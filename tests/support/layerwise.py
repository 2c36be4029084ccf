"""A pruned call by hand: the unpatched layers one after the other, each on the tokens that are alive there."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers.masking_utils import create_causal_mask

from support.host_parts import decoder
from support.oracle import suppressed
from vlmprune.methods.base import Method
from vlmprune.methods.registry import get_method
from vlmprune.patches.families.registry import find_family


class Positions(NamedTuple):
    """Whether positions close the gaps of what is dropped before the first layer, and between layers.

    From layer `trimmed` on what follows the prompt sees only what is left of it at the end.
    """

    entry: bool
    layers: bool
    trimmed: int | None = None


class HandRow(NamedTuple):
    """The columns of a row that are alive after the last layer, and their logits `[columns, vocabulary]`."""

    columns: Tensor
    logits: Tensor


def default_positions(model: Any, method: str | Method) -> Positions:
    """Return what a method, or one with its default parameters, does with positions if nothing is asked for."""
    method = get_method(method)() if isinstance(method, str) else method
    compact = not find_family(model).mrope
    inner = [part for part in method.parts() if part.site == "layer"]
    own = inner[0].positions if inner else None  # type: ignore[attr-defined]
    trimmed = inner[0].trims_cache(find_family(model).decoder_layers) if inner else None  # type: ignore[attr-defined]
    return Positions(compact, compact if own is None else own == "compact", trimmed)


@torch.no_grad()
def language_model_inputs(model: Any, inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Return what an unpatched model hands to its language model."""
    caught: list[dict[str, Any]] = []
    handle = decoder(model).register_forward_pre_hook(
        lambda module, args, kwargs: caught.append(kwargs), with_kwargs=True
    )
    try:
        model(**inputs, use_cache=False)
    finally:
        handle.remove()
    return caught[0]


def placeholders(model: Any, ids: Tensor) -> Tensor:
    """Return where the placeholders of images and videos are."""
    tokens = (getattr(model.config, f"{modality}_token_id", None) for modality in find_family(model).modalities)
    return torch.isin(ids, torch.tensor([token for token in tokens if token is not None]))


def alive_columns(model: Any, inputs: dict[str, Tensor], record: Any, row: int, layer: int) -> Tensor:
    """Return the columns of a row that reach `layer`, in the order in which it sees them."""
    ids, mask = inputs["input_ids"][row], inputs["attention_mask"][row].bool()
    visual = placeholders(model, ids)
    columns, mine = [(mask & ~visual).nonzero().flatten()], visual.nonzero().flatten()
    places = list(columns)
    for image in record.images:
        if image.batch_index == row:
            kept = [stage for first, stage in image.stages if first <= layer][-1]
            columns.append(mine[: image.total][kept])
            places.append(columns[-1].sort().values)
            mine = mine[image.total :]
    return torch.cat(columns)[torch.cat(places).argsort()]


def rows_of(columns: Tensor, alive: Tensor) -> Tensor:
    """Return where each of `alive` stands in `columns`."""
    order = columns.argsort()
    return order[torch.searchsorted(columns[order], alive)]


def mean_of_group(values: Tensor, members: Tensor, target: int) -> Tensor:
    """The mean of all that went into a token."""
    return values[members].mean(0)


def target_plus_mean(values: Tensor, members: Tensor, target: int) -> Tensor:
    """A token plus the mean of the others that went into it."""
    others = members[members != target]
    return values[target] + (values[others].mean(0) if len(others) else 0)


def folded(values: Tensor, members: Tensor, target: int) -> Tensor:
    """One token and the others of its group, each time the mean of what there is and the next one."""
    value = values[target]
    for member in members.sort().values.tolist():
        value = value if member == target else (value + values[member]) / 2
    return value


# How methods that merge between layers make one token of several.
MERGED_INSIDE = {"sparsevlm": mean_of_group, "visiondrop": target_plus_mean, "holitom": folded}


def merged_between(
    values: Tensor, columns: Tensor, alive: Tensor, record: Any, row: int, layer: int, mine: list[Tensor]
) -> Tensor:
    """Return the values `[alive, dim]` of the columns that go on at `layer`, merged where the record says so.

    Args:
        values: `[columns, dim]` of what came so far.
        columns: the columns before.
        alive: those behind.
        record: what was kept.
        row: which row.
        layer: the layer that begins.
        mine: per image of the row its placeholders.
    """
    merged = values[rows_of(columns, alive)]
    combine = next((MERGED_INSIDE[name] for name in record.method.split("+") if name in MERGED_INSIDE), None)
    images = [image for image in record.images if image.batch_index == row]
    for image, places in zip(images, mine, strict=True):
        for number, (first, groups) in enumerate(image.stage_groups):
            if combine is None or first != layer:
                continue
            before, after = (rows_of(columns, places[image.stages[number + step][1]]) for step in (0, 1))
            kept = rows_of(alive, places[image.stages[number + 1][1]])
            for place, target in enumerate(after.tolist()):
                members = before[groups == place]
                if len(members) > 1:
                    merged[kept[place]] = combine(values, members, target)
    return merged


def close_gaps(ids: Tensor, before: Tensor, after: Tensor) -> Tensor:
    """Lower `ids` by the number of ids below each that `before` holds and `after` does not."""
    used, left = before.unique(), after.unique()
    gone = used[~torch.isin(used, left)]
    return ids - torch.searchsorted(gone, ids.contiguous())


@torch.no_grad()
def row_by_layers(
    model: Any,
    inputs: dict[str, Tensor],
    record: Any,
    row: int,
    positions: Positions,
    later: Tensor | None = None,
    given: dict[str, Any] | None = None,
) -> HandRow:
    """Run one row through the unpatched layers, without a cache.

    Args:
        model: the unpatched model.
        inputs: the model inputs of the batch.
        record: what was kept.
        row: which row.
        positions: where positions close gaps.
        later: ids of tokens that follow the prompt, seen by all layers.
        given: `language_model_inputs(model, inputs)`, if at hand.
    """
    language_model = decoder(model)
    given = language_model_inputs(model, inputs) if given is None else given
    if isinstance(given.get("attention_mask"), dict):
        return row_by_own_masks(model, inputs, record, row, positions, later, given)
    later = torch.zeros(0, dtype=torch.int64) if later is None else later
    total = inputs["input_ids"].shape[1]
    after = total + torch.arange(len(later))
    visual = placeholders(model, inputs["input_ids"])
    valid = inputs["attention_mask"][row].bool().nonzero().flatten()

    ids = given.get("position_ids")
    ids = (
        torch.arange(total)[None] if ids is None else ids[-3:, row] if ids.ndim == 3 else ids[[min(row, len(ids) - 1)]]
    )
    ids = torch.cat([ids, ids[:, valid].max() + 1 + torch.arange(len(later)).expand(len(ids), -1)], 1)
    table = torch.cat([given["inputs_embeds"][row], model.get_input_embeddings()(later)])
    entry = torch.cat([alive_columns(model, inputs, record, row, 0), after])
    deep = given.get("deepstack_visual_embeds") or []
    deep_row = visual[row].cumsum(0) - 1 + int(visual[:row].sum())

    sizes = [image.total for image in record.images if image.batch_index == row]
    # Of a cropped prompt the last image may have fewer.
    tokens, ends = visual[row].nonzero().flatten(), list(accumulate(sizes))
    mine = [tokens[end - size : end] for size, end in zip(sizes, ends, strict=True)]
    columns, hidden = entry, table[entry]
    deep_planes = []
    for features in deep:
        plane = table.new_zeros(table.shape)
        plane[visual[row].nonzero().flatten()] = features[deep_row[visual[row]]].to(plane)
        deep_planes.append(plane[entry])
    for layer, module in enumerate(language_model.layers):
        alive = torch.cat([alive_columns(model, inputs, record, row, layer), after])
        hidden, *deep_planes = (
            merged_between(values, columns, alive, record, row, layer, mine) for values in (hidden, *deep_planes)
        )
        columns = alive
        # A token in another place than its own has the position of that place, where positions have no gaps.
        placed = columns.sort().values if positions.layers and len(ids) == 1 else columns
        first = torch.cat([valid, after]) if positions.entry else entry
        last = columns if positions.layers else entry
        ids_here = close_gaps(ids[:, placed], ids[:, first], ids[:, last])
        rotary_ids = ids_here[:, None] if len(ids) == 3 else ids_here
        linear = hasattr(module, "linear_attn")
        mask = None if linear else create_causal_mask(language_model.config, hidden[None], None, None)
        if positions.trimmed is not None and layer >= positions.trimmed and len(later):
            left = torch.cat([alive_columns(model, inputs, record, row, len(language_model.layers) - 1), after])
            seen = torch.isin(columns, left) | (columns < total)[:, None]
            mask = (seen & torch.ones_like(seen).tril())[None, None]
        hidden = module(
            hidden[None],
            attention_mask=mask,
            position_embeddings=language_model.rotary_emb(hidden[None], rotary_ids),
        )[0]
        if layer < len(deep_planes):
            hidden = hidden + deep_planes[layer]
    return HandRow(columns, model.lm_head(language_model.norm(hidden)))


@torch.no_grad()
def row_by_own_masks(
    model: Any,
    inputs: dict[str, Tensor],
    record: Any,
    row: int,
    positions: Positions,
    later: Tensor | None,
    given: dict[str, Any],
) -> HandRow:
    """Run one row through the unpatched language model of a host that makes masks by kinds of layers; nothing is cut inside.

    The masks are made here token by token: images see each other both ways where the host lets them, windows count the
    tokens that are left.
    """
    language_model, later = model.model.language_model, torch.zeros(0, dtype=torch.int64) if later is None else later
    columns = alive_columns(model, inputs, record, row, 0)
    total, first = inputs["input_ids"].shape[1], int(inputs["attention_mask"][row].argmax())
    entry = torch.cat([columns, total + torch.arange(len(later))])
    types = inputs.get("token_type_ids", inputs.get("mm_token_type_ids"))
    blocks, block = [], -1
    for column in range(total):
        seen = types is not None and bool(types[row, column])
        block += seen and not (column and bool(types[row, column - 1]))
        blocks.append(block if seen else -1)
    blocks += [-1] * len(later)
    config, count = language_model.config, len(entry)
    masks = {kind: torch.zeros(1, 1, count, count, dtype=torch.bool) for kind in given["attention_mask"]}
    both_ways = BOTH_WAYS[config.model_type](config)
    for kind, mask in masks.items():
        for query, asks in enumerate(entry.tolist()):
            for key, finds in enumerate(entry.tolist()):
                same = kind in both_ways and blocks[asks] >= 0 and blocks[asks] == blocks[finds]
                inside = kind == "full_attention" or query - key < config.sliding_window
                mask[0, 0, query, key] = inside and (key <= query or same)
    embeddings = torch.cat([given["inputs_embeds"][row, columns], model.get_input_embeddings()(later)])
    more = {}
    if given.get("per_layer_inputs") is not None:
        of_text = language_model.get_per_layer_inputs(later[None])[0]
        more["per_layer_inputs"] = torch.cat([given["per_layer_inputs"][row, columns], of_text])[None]
    ids = torch.arange(count) if positions.entry else entry - first
    output = language_model(
        inputs_embeds=embeddings[None], position_ids=ids[None], attention_mask=masks, use_cache=False, **more
    )
    return HandRow(entry, model.lm_head(output.last_hidden_state)[0])


# In which kinds of layers the tokens of an image see each other both ways, by the decoder's `model_type`.
BOTH_WAYS: dict[str, Callable[[Any], tuple[str, ...]]] = {
    "gemma3_text": lambda config: ("full_attention", "sliding_attention"),
    "gemma4_text": lambda config: ("sliding_attention",) if config.use_bidirectional_attention == "vision" else (),
}


def check_greedy(
    model: Any,
    inputs: dict[str, Tensor],
    record: Any,
    row: int,
    positions: Positions,
    new: Tensor,
    given: dict[str, Any] | None = None,
    first: int = 0,
) -> None:
    """Assert that `new[first:]` are the greedy choices after the prompt and the tokens before them."""
    logits = row_by_layers(model, inputs, record, row, positions, new[:-1], given).logits
    chosen = suppressed(logits[len(logits) - len(new) :]).argmax(-1)
    assert chosen[first:].tolist() == new[first:].tolist()
