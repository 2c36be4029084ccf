"""What a method is shown of Qwen2-VL and Qwen2.5-VL prompts: features, geometry and attention of the tower."""

import sys
from typing import ClassVar

import pytest
import torch
from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLVisionConfig
from transformers.vision_utils import get_vision_window_index

import vlmprune
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen2_vl import QWEN2_VL
from support.families.qwen_case import VIDEO_TOKEN
from support.layerwise import language_model_inputs
from support.tiny_models import IMAGE_TOKEN
from vlmprune.methods import DivPrune, FasterVLM
from vlmprune.methods.batch import VisionSignal
from vlmprune.patches.families.registry import find_family

ROWS = [[3, "A", 4], [2, "small", 1, "large", 6], [9]]
over_cases = pytest.mark.parametrize("case", [QWEN2_VL, QWEN2_5_VL], ids=repr)


class Watched(FasterVLM):
    """FasterVLM that keeps what it was shown."""

    seen: ClassVar[list] = []

    def select(self, batch):
        self.seen.append(batch)
        return super().select(batch)


class WatchedDivPrune(DivPrune):
    """DivPrune that keeps what it was shown."""

    seen: ClassVar[list] = []

    def select(self, batch):
        self.seen.append(batch)
        return super().select(batch)


def shown(model, method, call):
    type(method).seen.clear()
    with torch.no_grad(), vlmprune.pruned(model, method):
        call()
        record = vlmprune.last_run(model)
    (batch,) = type(method).seen
    return batch, record


def eager_attention_received(model, inputs, layer, monkeypatch):
    """Column means of the host's eager probabilities, as `[visual tokens, heads]` in raster order."""
    tower, weights = model.model.visual, []
    module = sys.modules[type(tower).__module__]
    original, attention = module.eager_attention_forward, tower.blocks[layer].attn

    def forward(attended, *args, **kwargs):
        output, probabilities = original(attended, *args, **kwargs)
        if attended is attention:
            weights.append(probabilities[0].mean(1).T)
        return output, probabilities

    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(module, "eager_attention_forward", forward)
        tower.set_attn_implementation("eager")
        tower(inputs["pixel_values"], grid_thw=inputs["image_grid_thw"])
        tower.set_attn_implementation("sdpa")
    tokens = torch.cat(weights).unflatten(0, (-1, 4)).mean(1)
    if not hasattr(tower, "window_size"):
        return tokens
    order, _ = get_vision_window_index(inputs["image_grid_thw"], 2, tower.window_size, tower.patch_size)
    return tokens[order.argsort()]


@over_cases
@pytest.mark.parametrize("call", ["forward", "generate", "beams"])
def test_attention_features_and_geometry(case, call, monkeypatch):
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    last = find_family(model).tower_facts.feature_layer
    options = {"max_new_tokens": 2, "num_beams": 2 if call == "beams" else 1}
    run = (lambda: model(**inputs)) if call == "forward" else (lambda: model.generate(**inputs, **options))
    batch, record = shown(model, Watched(keep=0.3), run)
    repeats = 1 if hasattr(model, "_supports_mm_encoder_outputs") or call != "beams" else 2
    assert len(batch.counts) == 3 * repeats
    assert record.signal == f"received_attention layer {last}"
    assert [image.total for image in record.images] == ([36, 36, 16, 48, 16, 48] if call == "beams" else [36, 16, 48])
    if repeats > 1:
        return
    assert batch.counts == (36, 16, 48)
    assert [layout.grid for layout in batch.layouts] == [(6, 6), (4, 4), (6, 8)]
    expected = eager_attention_received(model, inputs, last, monkeypatch)
    torch.testing.assert_close(batch.vision[VisionSignal("received_attention", last)], expected, atol=1e-6, rtol=1e-5)
    embeddings = language_model_inputs(model, inputs)["inputs_embeds"]
    torch.testing.assert_close(batch.features, embeddings[inputs["input_ids"] == IMAGE_TOKEN])


@over_cases
def test_images_and_videos_in_one_prompt(case):
    model = case.build(torch.float32)
    inputs = case.inputs([[1, "video large", 2, "A", 3], ["small", 2, "video small", 4]])
    batch, record = shown(model, WatchedDivPrune(keep=0.3), lambda: model(**inputs))
    assert batch.counts == (36, 16, 96, 32), "images first, then videos"
    assert [layout.grid for layout in batch.layouts] == [(6, 6), (4, 4), None, None]
    large = batch.layouts[2]
    assert large.tile_grid == (4, 6)
    assert large.frame.tolist() == [frame for frame in range(4) for _ in range(24)]
    assert large.row.tolist() == [row for row in range(4) for _ in range(6)] * 4
    assert large.column.tolist() == list(range(6)) * 16
    ids, embeddings = inputs["input_ids"], language_model_inputs(model, inputs)["inputs_embeds"]
    expected = torch.cat([embeddings[ids == IMAGE_TOKEN], embeddings[ids == VIDEO_TOKEN]])
    torch.testing.assert_close(batch.features, expected)
    assert [(image.batch_index, image.total) for image in record.images] == [(0, 96), (0, 36), (1, 16), (1, 32)]
    assert [len(image.kept) for image in record.images] == [29, 11, 5, 10]


@over_cases
def test_tower_facts(case):
    family = find_family(case.build(torch.float32))
    assert not family.tower_facts.has_cls
    assert family.tower_facts.feature_layer == family.tower_facts.layers - 1
    assert family.mrope
    assert family.modalities == ("image", "video")


def test_published_towers_end_in_full_attention():
    config = Qwen2_5_VLVisionConfig()
    assert config.depth - 1 in config.fullatt_block_indexes


@over_cases
@pytest.mark.parametrize("seed", [0, 1])
def test_a_video_keeps_what_is_asked_for(case, seed):
    model, inputs = case.build(torch.float32), case.inputs([[2, "video A", 3]])
    with torch.no_grad(), vlmprune.pruned(model, "random", keep=7, seed=seed):
        model.generate(**inputs, max_new_tokens=2)
        (video,) = vlmprune.last_run(model).images
    assert (video.total, len(video.kept)) == (48, 7)
