"""Marker rows: arguments whose every value is the number of its own token prove by value what each gather took."""

import pytest
import torch

import vlmprune
from support.general.host_case import build
from support.general.shrunk import model_class
from vlmprune.errors import UnsupportedCallError
from vlmprune.patches.families.registry import find_family
from vlmprune.patches.prefill.compaction import plan_compaction
from vlmprune.patches.prefill.token_arguments import TokenPlaces, compact_token_arguments

ROWS = [[3, "A", 4], [5, "B", 6]]
# Per-layer inputs, deepstack planes, token types that the experts are chosen by.
CLASSES = [
    name
    for name in (
        "Gemma4ForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Ernie4_5_VLMoeForConditionalGeneration",
    )
    if model_class(name)
]


def marked(value, columns):
    """`value` with the number of the token in every place."""
    if isinstance(value, (list, tuple)):
        return [marked(item, columns) for item in value]
    if not isinstance(value, torch.Tensor) or value.ndim < 2:
        return value
    if value.shape[:2] == columns.shape:
        shape = columns.shape
        return columns.view(*shape, *[1] * (value.ndim - 2)).expand_as(value).to(value.dtype).clone()
    return value


@pytest.mark.parametrize("name", CLASSES)
def test_what_reaches_the_decoder_is_what_the_kept_tokens_had(name):
    case = build(name)
    inputs = case.inputs(ROWS)
    batch, width = inputs["input_ids"].shape
    columns = torch.arange(1, batch * width + 1).view(batch, width)
    placeholders = inputs["input_ids"] == case.model.config.image_token_id
    seen = {}

    def mark(module, args, kwargs):
        changed = {key: marked(kwargs.get(key), columns) for key in ("per_layer_inputs", "moe_mm_token_type_ids")}
        changed = {key: value for key, value in changed.items() if value is not None}
        if kwargs.get("visual_pos_masks") is not None:
            visual = columns[placeholders].float()
            changed["deepstack_visual_embeds"] = [visual[:, None].expand(-1, 32).clone() for _ in range(2)]
        return args, {**kwargs, **changed, "inputs_embeds": kwargs["inputs_embeds"]}

    def look(module, args, kwargs):
        seen.update(kwargs)
        raise StopIteration

    decoder = find_family(case.model).language_model
    first = decoder.register_forward_pre_hook(mark, with_kwargs=True)
    try:
        with torch.no_grad(), vlmprune.pruned(case.model, "divprune", keep=0.5):
            last = decoder.register_forward_pre_hook(look, with_kwargs=True)
            try:
                with pytest.raises(StopIteration):
                    case.model(**inputs)
            finally:
                last.remove()
            # The record is whole once the call is; what was kept is deterministic.
            first.remove()
            case.model(**inputs)
            run = vlmprune.last_run(case.model)
    finally:
        first.remove()
    kept = inputs["attention_mask"].bool() & ~placeholders
    for image in run.images:
        places = placeholders[image.batch_index].nonzero().flatten()[image.kept]
        kept[image.batch_index, places] = True
    wanted = [columns[row, kept[row]].tolist() for row in range(batch)]
    checked = 0
    for key in ("per_layer_inputs", "moe_mm_token_type_ids"):
        if isinstance(seen.get(key), torch.Tensor):
            checked += 1
            rows = seen[key].reshape(batch, seen[key].shape[1], -1)
            for row in range(batch):
                tokens = rows[row, -len(wanted[row]) :]
                assert (tokens == tokens[:, :1]).all()
                assert tokens[:, 0].long().tolist() == wanted[row], key
    if seen.get("deepstack_visual_embeds"):
        checked += 1
        of_images = columns[kept & placeholders].tolist()
        for plane in seen["deepstack_visual_embeds"]:
            assert plane[:, 0].long().tolist() == of_images
            assert (plane == plane[:, :1]).all()
    assert checked


ROTATED = [
    name
    for name in (
        "Gemma3ForConditionalGeneration",
        "Gemma4ForConditionalGeneration",
        "LlavaForConditionalGeneration",
        "Qwen3VLForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
    )
    if model_class(name)
]


@pytest.mark.parametrize("name", ROTATED)
def test_rotary_rows_and_embeddings_are_those_of_the_kept_tokens(name):
    """Positions and embeddings hold the number of their token in every place, rows of other lengths side by side."""
    case = build(name)
    inputs = case.inputs(ROWS)
    batch, width = inputs["input_ids"].shape
    columns = torch.arange(1, batch * width + 1).view(batch, width)
    family, seen = find_family(case.model), {}

    def mark(module, args, kwargs):
        positions = columns.expand(3, batch, width) if family.mrope else columns
        return args, {**kwargs, "position_ids": positions, "inputs_embeds": marked(kwargs["inputs_embeds"], columns)}

    def look(module, args, kwargs):
        seen.update(kwargs)
        raise StopIteration

    decoder = family.language_model
    handles = [decoder.register_forward_pre_hook(mark, with_kwargs=True)]
    try:
        with torch.no_grad(), vlmprune.pruned(case.model, "uniform", keep=0.5, positions="original"):
            handles.append(decoder.register_forward_pre_hook(look, with_kwargs=True))
            with pytest.raises(StopIteration):
                case.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    placeholders = inputs["input_ids"] == case.model.config.image_token_id
    for row in range(batch):
        tokens = seen["inputs_embeds"][row]
        kept = tokens[:, 0][tokens[:, 0] > 0].long().tolist()
        assert (tokens == tokens[:, :1]).all()
        text = columns[row][inputs["attention_mask"][row].bool() & ~placeholders[row]].tolist()
        assert set(text) < set(kept) < set(columns[row].tolist())
        assert kept == sorted(kept)
        rotary = seen["position_ids"][-3:, row] if family.mrope else seen["position_ids"][row][None]
        for axis in rotary:
            assert axis[-len(kept) :].tolist() == kept


def planned():
    """Two rows of six columns; row 0 keeps 0, 2, 3 and 5, row 1 keeps 1, 4 and 5; columns 1 to 4 are visual."""
    keep = torch.tensor([[1, 0, 1, 1, 0, 1], [0, 1, 0, 0, 1, 1]]).bool()
    visual = torch.tensor([[0, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 0]]).bool()
    compaction = plan_compaction(keep, visual, (4, 3), (2, 2))
    return TokenPlaces(compaction, 8, torch.tensor([1, 2, 4, 7]))


def test_every_shape_is_gathered_by_value():
    places = planned()
    columns = torch.arange(1, 13).view(2, 6)
    given = {
        "types": columns,
        "planes": columns.view(2, 6, 1, 1).expand(2, 6, 3, 5).float(),
        "axes": columns.expand(3, 2, 6),
        "alike": torch.arange(1, 7).view(1, 6, 1).expand(1, 6, 4),
        "deep": [torch.arange(8.0)[:, None].expand(8, 5), torch.arange(8.0, 16.0)[:, None].expand(8, 5)],
        "by_layer": {"full": columns},
        "flag": True,
        "number": torch.tensor(3),
    }
    made = compact_token_arguments(given, places)
    rows = torch.tensor([[1, 3, 4, 6], [0, 8, 11, 12]])
    assert torch.equal(made["types"], rows)
    assert torch.equal(made["planes"], rows.view(2, 4, 1, 1).expand(2, 4, 3, 5).float())
    assert torch.equal(made["axes"], rows.expand(3, 2, 4))
    assert torch.equal(made["alike"][..., 0], torch.tensor([[1, 3, 4, 6], [0, 2, 5, 6]]))
    assert [plane[:, 0].tolist() for plane in made["deep"]] == [[1, 2, 4, 7], [9, 10, 12, 15]]
    assert torch.equal(made["by_layer"]["full"], rows)
    assert made["flag"] is True
    assert made["number"] is given["number"]


@pytest.mark.parametrize("shape", [(2, 5), (7, 3), (12,), (3, 6, 2)])
def test_what_cannot_be_placed_is_refused_by_name(shape):
    with pytest.raises(UnsupportedCallError, match=r"is given table\['rows'\]\[0\] of shape"):
        compact_token_arguments({"table": {"rows": [torch.zeros(shape)]}}, planned())


def test_what_can_be_read_in_two_ways_is_refused_by_name():
    keep, visual = torch.ones(2, 2).bool(), torch.tensor([[1, 0], [1, 0]]).bool()
    keep[0, 0] = False
    places = TokenPlaces(plan_compaction(keep, visual, (1, 2), (1, 0)), 2, torch.tensor([1]))
    with pytest.raises(UnsupportedCallError, match="can be read in two ways"):
        compact_token_arguments({"planes": torch.zeros(2, 2, 4)}, places)
