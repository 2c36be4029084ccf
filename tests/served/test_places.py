"""Positions of kept tokens: base positions and places together are the ids of the full prompt, in every dtype."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from support.family_cases import FAMILY_CASES
from vlmprune.patches.vllm.places import CHANNELS, append_places, base_positions, split_places

QWEN = [case for case in FAMILY_CASES if case.name in ("qwen2-vl", "qwen2.5-vl", "qwen3-vl")]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@given(rows=st.lists(st.integers(0, 60_000), min_size=1, max_size=20), seed=st.integers(0, 9))
def test_places_are_exact(dtype, rows, seed):
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randint(0, 60_000, (len(rows),), generator=generator)
    features = torch.randn(len(rows), 5, generator=generator).to(dtype)
    whole = append_places(features, torch.tensor(rows), columns)
    assert whole.dtype == dtype
    assert whole.shape[1] == 5 + CHANNELS
    # A prompt is computed in chunks.
    cut = seed % (len(rows) + 1)
    parts, places = split_places([whole[:cut], whole[cut:]])
    assert torch.equal(torch.cat(parts), features)
    assert torch.equal(places, torch.stack([torch.zeros(len(rows)).long(), torch.tensor(rows), columns]))


@pytest.mark.parametrize("case", QWEN, ids=str)
def test_ids_are_those_of_the_full_prompt(case):
    model = case.build(torch.float32)
    inputs = case.inputs([[5, "small", 3, "large", 7]])
    wanted = case.positions(model, inputs)[:, 0]
    ids, merge = inputs["input_ids"][0], 2
    images = inputs["image_grid_thw"].tolist()
    starts = [place + 1 for place, token in enumerate(ids.tolist()) if token == case_start(model)]
    assert len(starts) == len(images) == 2
    generator = torch.Generator().manual_seed(0)
    kept = [torch.randperm(h * w // 4, generator=generator)[:5].sort().values for _, h, w in images]
    stay = torch.ones(len(ids), dtype=torch.bool)
    for start, (_, h, w), own in zip(starts, images, kept, strict=True):
        stay[start : start + h * w // 4] = False
        stay[start + own] = True
    columns = (stay & (ids == model.config.image_token_id))[stay].nonzero().flatten()
    firsts = [int(columns[0]), int(columns[5])]
    spans = [(first, 5, max(h, w) // merge) for first, (_, h, w) in zip(firsts, images, strict=True)]
    positions, delta = base_positions(int(stay.sum()), spans)
    places = [
        torch.stack([own * 0, own // (w // 2), own % (w // 2)]) for own, (_, _, w) in zip(kept, images, strict=True)
    ]
    positions[:, columns] += torch.cat(places, 1)
    assert torch.equal(positions, wanted[:, stay])
    assert int(stay.sum()) + delta == int(wanted.max()) + 1


def case_start(model):
    return model.config.vision_start_token_id


def test_text_alone():
    positions, delta = base_positions(4, [])
    assert positions.tolist() == [[0, 1, 2, 3]] * 3
    assert delta == 0


def test_a_prompt_that_ends_with_an_image():
    positions, delta = base_positions(5, [(2, 3, 7)])
    assert positions[0].tolist() == [0, 1, 2, 2, 2]
    assert 5 + delta == 9
