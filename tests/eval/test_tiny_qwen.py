"""The shipped tiny-qwen2.5-vl: an ordinary checkpoint folder, dynamic resolution, right answers, none without the picture."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor, Qwen2_5_VLForConditionalGeneration

from vlmprune.eval.training.common.dataset import load_rows
from vlmprune.eval.training.common.evaluate import measure, prompt
from vlmprune.eval.training.qwen.batches import SizedPlan, make_batch
from vlmprune.eval.training.qwen.language import slot_layout
from vlmprune.eval.training.qwen.model import TOKEN_SIZE, qwen_config
from vlmprune.eval.training.qwen.tokenizer import VisionPrompts, build_tokenizer
from vlmprune.eval.training.qwen.tower import pack

FOLDER = Path(__file__).parents[2] / "eval" / "checkpoints" / "tiny-qwen2.5-vl"


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


def encode(processor, size):
    return processor(
        images=[Image.new("RGB", size)], text=[prompt(processor, "how many circles?")], return_tensors="pt"
    )


def test_folder_is_small_and_loads(model):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12_000_000
    assert isinstance(model, Qwen2_5_VLForConditionalGeneration)
    assert "5 % random" in (FOLDER / "README.md").read_text()


@pytest.mark.parametrize("size", [(192, 192), (288, 192), (160, 320), (384, 384), (200, 120)])
def test_tokens_follow_the_size_of_the_picture(model, processor, size):
    inputs = encode(processor, size)
    wanted = round(size[0] / TOKEN_SIZE) * round(size[1] / TOKEN_SIZE)
    assert int((inputs["input_ids"] == model.config.image_token_id).sum()) == wanted
    features = model.get_image_features(inputs["pixel_values"], inputs["image_grid_thw"]).pooler_output
    assert [len(part) for part in features] == [wanted]


def test_answers_need_the_picture(model, processor):
    rows = load_rows().select(range(10))
    tasks = ("attribute", "reading")
    seen = measure(model, processor, rows, tasks=tasks)
    blind = measure(model, processor, rows, "blind", tasks=tasks)
    assert all(seen[task] >= 0.8 for task in tasks)
    assert all(blind[task] < 0.5 for task in tasks)


def test_training_prepares_pictures_and_positions_as_the_host_does(model, processor):
    prompts = VisionPrompts(build_tokenizer())
    plan = SizedPlan(60, ((6, 9),), turns=(("attribute", 1),))
    batch = make_batch(plan, prompts, np.random.default_rng(0))
    text = [prompt(processor, "what colour is the ring?")]
    inputs = processor(images=[Image.fromarray(batch.pixels[0].numpy())], text=text, return_tensors="pt")
    assert torch.allclose(inputs["pixel_values"], pack(batch.pixels[:1]), atol=1e-5)
    assert inputs["input_ids"][0, : len(prompts.prefix)].tolist() == prompts.prefix
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"], inputs["mm_token_type_ids"], image_grid_thw=inputs["image_grid_thw"]
    )
    _, laid_out = slot_layout(len(prompts.prefix), batch.size, len(prompts.suffix), 1)
    length = inputs["input_ids"].shape[1]
    assert torch.equal(laid_out[:, :, :length], positions)


def test_labels_lie_where_the_things_are():
    prompts = VisionPrompts(build_tokenizer())
    batch = make_batch(SizedPlan(300, ((12, 12),)), prompts, np.random.default_rng(1))
    assert batch.patches.shape[1:] == (6, 144, 4)
    for tokens, patches in zip(batch.tokens, batch.patches, strict=True):
        assert int((tokens[2] > 0).sum()) == int((patches[5] == 1).sum()) == int(tokens[3].max())
        assert torch.equal(tokens[5] > 0, ((patches[0] > 0) | (patches[2] > 0)).any(-1))


def test_shipped_configuration_is_the_one_of_the_training(model):
    wanted = qwen_config(build_tokenizer())
    assert model.config.text_config.rope_parameters == wanted.text_config.rope_parameters
    assert model.config.vision_config.fullatt_block_indexes == wanted.vision_config.fullatt_block_indexes
