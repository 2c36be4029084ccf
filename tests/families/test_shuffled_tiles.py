"""InternVL and Idefics3: what is read of the tower, patch by patch against the host's own eager attention, cell by cell."""

import pytest
import torch

import vlmprune
from support.families.idefics3 import IDEFICS3, SMOLVLM
from support.families.internvl import INTERNVL, INTERNVL_PLAIN
from support.tower_probe import host_attention, seen_by_a_method
from vlmprune.errors import LayoutError
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.families.registry import find_family

CASES = (INTERNVL, INTERNVL_PLAIN, IDEFICS3, SMOLVLM)
ROWS = [[3, "A", 4], [2, "B", 1, "large", 6], [9]]
TILES = 5
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


def patches_of_cells(case, leading):
    """For every visual token of a tile, the tower's tokens that it is made of, by its row and column."""
    family = find_family(case.build(torch.float32))
    side, across = family.cell_side, 5
    return [
        [
            leading + (row * side + inner) * across * side + column * side + further
            for inner in range(side)
            for further in range(side)
        ]
        for row in range(across)
        for column in range(across)
    ]


@over_cases
def test_attention_is_the_hosts_averaged_over_the_patches_of_a_cell(case, monkeypatch):
    facts = find_family(case.build(torch.float32)).tower_facts
    leading = int(facts.has_cls)
    layers = range(facts.layers)
    received = [VisionSignal("received_attention", layer) for layer in layers]
    of_cls = [VisionSignal("cls_attention", layer) for layer in layers if facts.has_cls]
    keys = [VisionSignal("keys", layer) for layer in layers]
    batch = seen_by_a_method(monkeypatch, case, ROWS, [*received, *of_cls, *keys])
    host = host_attention(monkeypatch, case, ROWS)
    for layer in layers:
        [(weights, _, key)] = host[layer]
        assert len(weights) == TILES
        for kind, patches in (
            ("received_attention", weights.mean(2).transpose(1, 2)),
            ("cls_attention", weights[:, :, 0].transpose(1, 2)),
            ("keys", key.transpose(1, 2).flatten(2)),
        ):
            if VisionSignal(kind, layer) not in batch.vision:
                continue
            expected = torch.stack([tile[cell].mean(0) for tile in patches for cell in patches_of_cells(case, leading)])
            torch.testing.assert_close(batch.vision[VisionSignal(kind, layer)], expected, atol=1e-6, rtol=1e-4)


@over_cases
def test_features_are_those_of_the_cell_and_make_the_token(case, monkeypatch):
    """The order of scores is that of tokens: what the tower gives a cell's patches, side by side, is projected to the token."""
    model = case.build(torch.float32)
    family = find_family(model)
    facts = family.tower_facts
    signal = VisionSignal("features", facts.feature_layer)
    batch = seen_by_a_method(monkeypatch, case, ROWS, [signal])
    outputs = []
    tower = family.vision_tower
    handle = tower.register_forward_hook(lambda module, args, output: outputs.append(output))
    with torch.no_grad():
        model(**case.inputs(ROWS))
    handle.remove()
    hidden = outputs[0].last_hidden_state
    expected = torch.stack(
        [tile[cell].flatten() for tile in hidden for cell in patches_of_cells(case, int(facts.has_cls))]
    )
    torch.testing.assert_close(batch.vision[signal], expected, atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(batch.project(expected), batch.features, atol=1e-5, rtol=1e-4)
    assert batch.counts == (25,) * TILES
    assert all(layout.grid == (5, 5) for layout in batch.layouts)


@over_cases
def test_the_mean_query_asks_the_mean_keys_of_cells(case, monkeypatch):
    facts = find_family(case.build(torch.float32)).tower_facts
    leading, last = int(facts.has_cls), facts.layers - 1
    signal = VisionSignal("mean_query_attention", last)
    batch = seen_by_a_method(monkeypatch, case, ROWS, [signal])
    [(_, query, key)] = host_attention(monkeypatch, case, ROWS)[last]
    for tile in range(TILES):
        cells = [key[tile, :, cell].mean(1) for cell in patches_of_cells(case, leading)]
        keys = torch.stack([*key[tile].transpose(0, 1)[:leading], *cells], 1)
        logits = torch.einsum("hd,hkd->hk", query[tile].mean(1), keys) * query.shape[-1] ** -0.5
        expected = logits.softmax(-1)[:, leading:].T
        torch.testing.assert_close(batch.vision[signal][25 * tile : 25 * tile + 25], expected, atol=1e-6, rtol=1e-4)


def test_the_cls_token_is_projected_as_a_cell_of_its_own(monkeypatch):
    signal = VisionSignal("cls_features", 2)
    batch = seen_by_a_method(monkeypatch, INTERNVL, ROWS, [signal])
    rows = torch.cat(batch.tile_vision[signal])
    assert rows.shape == (TILES, 4 * 32)
    assert torch.equal(rows[:, :32].repeat(1, 4), rows)
    assert batch.project(rows).shape == (TILES, 32)


@pytest.mark.parametrize("case", [INTERNVL, SMOLVLM], ids=str)
@pytest.mark.parametrize("method", ["fastervlm", "visionzip", "pool", "divprune"])
def test_a_tile_is_cut_as_alone(case, method):
    model = case.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=7):
        model(**case.inputs(ROWS))
        together = vlmprune.last_run(model).images
        assert [(image.batch_index, image.total) for image in together] == [(0, 25), *[(1, 25)] * 4]
        model(**case.inputs([[1, "large", 2]]))
        alone = vlmprune.last_run(model).images
    assert [image.kept.tolist() for image in alone] == [image.kept.tolist() for image in together[2:]]


def test_a_tile_that_is_masked_in_parts_is_refused_by_what_reads_attention():
    model, inputs = SMOLVLM.build(torch.float32), SMOLVLM.inputs([[3, "A", 4]])
    inputs["pixel_attention_mask"] = inputs["pixel_attention_mask"].clone()
    inputs["pixel_attention_mask"][..., 20:] = False
    with torch.no_grad():
        with vlmprune.pruned(model, "fastervlm", keep=0.5), pytest.raises(LayoutError, match="pixel_attention_mask"):
            model(**inputs)
        with vlmprune.pruned(model, "divprune", keep=0.5):
            model(**inputs)
            assert len(vlmprune.last_run(model).images[0].kept) == 12


def test_tiles_of_another_size_are_refused():
    model, inputs = SMOLVLM.build(torch.float32), SMOLVLM.inputs([[3, "A", 4]])
    inputs["pixel_values"] = inputs["pixel_values"][..., :20]
    with vlmprune.pruned(model, "divprune", keep=0.5), pytest.raises(LayoutError, match=r"tiles of \[40, 20\] pixels"):
        model(**inputs)
