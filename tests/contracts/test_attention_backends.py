"""Contract 8: attention backends stay as they are; the capture costs one row and is exact."""

from typing import ClassVar

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import CLIPVisionConfig

import vlmprune
from support.tiny_models import CLIP, LLAVA_CLIP_GQA, llava_case
from vlmprune.methods import FasterVLM
from vlmprune.methods.batch import VisionSignal


class OutputShapes(TorchDispatchMode):
    """Collects the shapes of all tensors that operations return."""

    def __init__(self):
        super().__init__()
        self.shapes = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for item in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(item, torch.Tensor):
                self.shapes.add(tuple(item.shape))
        return result


class Recorder(FasterVLM):
    """FasterVLM that keeps what it was given."""

    seen: ClassVar[list] = []

    def select(self, batch):
        self.seen.append(batch)
        return super().select(batch)


def test_tower_stays_on_sdpa_and_the_capture_is_one_row():
    vision = CLIPVisionConfig(**{**CLIP.to_dict(), "image_size": 44})
    case = llava_case("llava-wide", vision=vision)
    model = case.build(torch.float32)
    inputs = case.inputs([[3, "A", 4]])
    tokens = case.tokens("A") + 1
    assert model.model.vision_tower.config._attn_implementation == "sdpa"
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.2):
        model(**inputs)
        with OutputShapes() as seen:
            model(**inputs)
        assert model.model.vision_tower.config._attn_implementation == "sdpa"
    square = [shape for shape in seen.shapes if shape[-2:] == (tokens, tokens)]
    assert square == [], "something materialised an attention map of the tower"
    rows = [shape for shape in seen.shapes if len(shape) >= 2 and shape[-1] == tokens and 1 in shape[-3:-1]]
    assert rows, "the CLS row itself must have been computed"


@pytest.mark.parametrize("layer", [-1, -2, -3, 1])
def test_captured_row_equals_the_hosts_eager_attention(layer):
    model = LLAVA_CLIP_GQA.build(torch.float32)
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4], [2, "B", 1, "C", 6]])
    previous, model.config.vision_feature_layer = model.config.vision_feature_layer, layer
    expected_layer = {-1: 2, -2: 1, -3: 0, 1: 0}[layer]
    try:
        Recorder.seen.clear()
        with torch.no_grad(), vlmprune.pruned(model, Recorder(keep=0.3)):
            model(**inputs)
            assert vlmprune.last_run(model).signal == f"cls_attention layer {expected_layer}"
        tower = model.model.vision_tower
        tower.set_attn_implementation("eager")
        with torch.no_grad():
            attentions = tower(inputs["pixel_values"], output_attentions=True).attentions
    finally:
        model.config.vision_feature_layer = previous
        model.model.vision_tower.set_attn_implementation("sdpa")
    captured = Recorder.seen[-1].vision[VisionSignal("cls_attention", expected_layer)]
    expected = attentions[expected_layer][:, :, 0, 1:].transpose(1, 2).flatten(0, 1)
    torch.testing.assert_close(captured, expected, atol=1e-6, rtol=1e-5)
    assert captured.dtype == torch.float32


def test_scores_are_fp32_in_half_precision():
    model = LLAVA_CLIP_GQA.build(torch.bfloat16)
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4]], dtype=torch.bfloat16)
    Recorder.seen.clear()
    with torch.no_grad(), vlmprune.pruned(model, Recorder(keep=0.3)):
        model(**inputs)
    captured = Recorder.seen[-1].vision[VisionSignal("cls_attention", 1)]
    assert captured.dtype == torch.float32
    assert captured.flatten().unique().numel() > 0.9 * captured.numel(), "bf16 scores would tie"


def test_no_captured_tensor_outlives_the_call():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4]])
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=0.3):
        model(**inputs)
        engine = model.__dict__["_vlmprune"]
        assert engine.calls.model == []
        assert engine.calls.tower == []
        run = vlmprune.last_run(model)
    held = [value for value in vars(run).values() if isinstance(value, torch.Tensor)]
    assert held == []
    assert all(kept.dtype == torch.int64 for kept in run.kept_per_image)
