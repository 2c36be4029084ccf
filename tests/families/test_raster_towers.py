"""Pixtral (Mistral 3, LLaVA) and PaddleOCR-VL: what is read of towers that take patches row by row, against the host's own."""

import pytest
import torch

import vlmprune
from support.families.paddleocr_vl import PADDLEOCR_VL
from support.families.pixtral import LLAVA_PIXTRAL, MISTRAL3
from support.tiny_models import LLAVA_CLIP_GQA
from support.tower_probe import host_attention, seen_by_a_method
from vlmprune.errors import LayoutError, UnsupportedMethodError
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.families.llava import Llava
from vlmprune.patches.families.registry import find_family

CASES = (MISTRAL3, LLAVA_PIXTRAL, PADDLEOCR_VL)
ROWS = [[3, "A", 4], [2, "small", 1, "large", 6], [9]]
over_cases = pytest.mark.parametrize("case", CASES, ids=str)


def sides(case):
    """Patches along the side of a visual token, and rows and columns of patches of each picture of `ROWS`."""
    if case is PADDLEOCR_VL:
        return 2, [tuple(grid[1:]) for grid in case.inputs(ROWS)["image_grid_thw"].tolist()]
    sizes = case.inputs(ROWS)["image_sizes"].tolist()
    return (2 if case is MISTRAL3 else 1), [(rows // 4, columns // 4) for rows, columns in sizes]


def patches_of_tokens(case):
    """For every visual token the patches that it is made of, in the tower's order, by row and column."""
    side, grids = sides(case)
    found, start = [], 0
    for rows, columns in grids:
        for row in range(0, rows, side):
            for column in range(0, columns, side):
                found.append(
                    [
                        start + (row + inner) * columns + column + further
                        for inner in range(side)
                        for further in range(side)
                    ]
                )
        start += rows * columns
    return found


@over_cases
def test_signals_are_the_hosts_averaged_over_the_patches_of_a_token(case, monkeypatch):
    layers = range(3)
    kinds = ("received_attention", "keys", "mean_query_attention")
    batch = seen_by_a_method(monkeypatch, case, ROWS, [VisionSignal(kind, layer) for kind in kinds for layer in layers])
    host, tokens = host_attention(monkeypatch, case, ROWS), patches_of_tokens(case)
    _, grids = sides(case)
    for layer in layers:
        # All pictures in one call, or one call each.
        query, key = (torch.cat([call[part][0] for call in host[layer]], 1) for part in (1, 2))
        received, start = [], 0
        asked = []
        for number, (rows, columns) in enumerate(grids):
            end = start + rows * columns
            calls = host[layer]
            weights = calls[0][0][0][:, start:end, start:end] if len(calls) == 1 else calls[number][0][0]
            assert torch.allclose(weights.sum(-1), torch.ones(()), atol=1e-5)
            received.append(weights.mean(1).T)
            own = [token for token in tokens if start <= token[0] < end]
            means = torch.stack([key[:, token].mean(1) for token in own])
            logits = torch.einsum("hd,khd->kh", query[:, start:end].mean(1), means) * query.shape[-1] ** -0.5
            asked.append(logits.softmax(0))
            start = end
        patches = torch.cat(received)
        expected = {
            "received_attention": torch.stack([patches[token].mean(0) for token in tokens]),
            "keys": torch.stack([key[:, token].mean(1).flatten() for token in tokens]),
            "mean_query_attention": torch.cat(asked),
        }
        for kind in kinds:
            torch.testing.assert_close(
                batch.vision[VisionSignal(kind, layer)], expected[kind], atol=1e-5, rtol=1e-4, msg=kind
            )


@over_cases
def test_features_make_the_token(case, monkeypatch):
    """The order of scores is that of tokens: what the tower gives the patches of a token, side by side, is projected to it."""
    model = case.build(torch.float32)
    signal = VisionSignal("features", 2)
    batch = seen_by_a_method(monkeypatch, case, ROWS, [signal])
    seen = []
    tower = find_family(model).vision_tower
    handle = tower.register_forward_hook(lambda module, args, output: seen.append(output.last_hidden_state))
    with torch.no_grad():
        model(**case.inputs(ROWS))
        handle.remove()
        hidden = seen[0].flatten(0, -2)
        if case is MISTRAL3:
            hidden = model.model.multi_modal_projector.norm(hidden)
        expected = torch.stack([hidden[token].flatten() for token in patches_of_tokens(case)])
        torch.testing.assert_close(batch.vision[signal], expected, atol=1e-6, rtol=1e-4)
        torch.testing.assert_close(batch.project(expected), batch.features, atol=1e-5, rtol=1e-4)


def test_the_tower_decides_which_family_a_llava_is():
    pixtral, clip = find_family(LLAVA_PIXTRAL.build(torch.float32)), find_family(LLAVA_CLIP_GQA.build(torch.float32))
    assert pixtral.name == "Pixtral"
    assert type(clip) is Llava


def test_one_picture_without_its_size_has_no_grid():
    model, inputs = LLAVA_PIXTRAL.build(torch.float32), LLAVA_PIXTRAL.inputs([[3, "A", 4]])
    del inputs["image_sizes"]
    inputs["pixel_values"] = inputs["pixel_values"][..., :24, :24]
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=9):
        model(**inputs)
        [image] = vlmprune.last_run(model).images
    assert (image.total, len(image.kept), image.grid) == (36, 9, None)


def test_pictures_that_cannot_be_told_apart_are_refused():
    model = LLAVA_PIXTRAL.build(torch.float32)
    inputs = LLAVA_PIXTRAL.inputs([[3, "A", 4, "B", 2]])
    del inputs["image_sizes"]
    with vlmprune.pruned(model, "divprune", keep=0.5), pytest.raises(LayoutError, match=r"2 pictures.*image_sizes"):
        model(**inputs)
    model, inputs = MISTRAL3.build(torch.float32), MISTRAL3.inputs([[3, "A", 4]])
    inputs["image_sizes"] = torch.tensor([[44, 48]])
    with (
        vlmprune.pruned(model, "divprune", keep=0.5),
        pytest.raises(LayoutError, match=r"44 x 48 pixels.*multiples of 8"),
    ):
        model(**inputs)


@over_cases
def test_needs_that_are_not_met(case):
    with pytest.raises(UnsupportedMethodError, match="blocks"):
        vlmprune.apply(case.build(torch.float32), "tome", keep=0.5)
