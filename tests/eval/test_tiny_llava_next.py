"""The shipped tiny-llava-next: its files, its tiles, and that it answers, with the picture and not without."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("datasets")

from transformers import AutoModelForImageTextToText, AutoProcessor, LlavaNextForConditionalGeneration

from vlmprune.eval.training.common.dataset import load_rows
from vlmprune.eval.training.common.evaluate import measure
from vlmprune.eval.training.common.scenes import make_scene, render
from vlmprune.eval.training.next.batches import make_batch
from vlmprune.eval.training.next.tiles import cut, stitch

FOLDER = Path(__file__).parents[2] / "eval" / "checkpoints" / "tiny-llava-next"


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


def test_folder_is_small_and_complete(model):
    assert isinstance(model, LlavaNextForConditionalGeneration)
    files = {path.name: path.stat().st_size for path in FOLDER.iterdir()}
    assert sum(files.values()) < 12e6
    assert {"README.md", "config.json", "generation_config.json", "tokenizer.json", "chat_template.jinja"} <= set(files)


@pytest.mark.parametrize(("grid", "tokens"), [((2, 2), 744), ((1, 2), 444), ((3, 2), 1044)])
def test_tiles_of_training_are_those_of_the_processor(model, processor, grid, tokens):
    scene = make_scene(np.random.default_rng(3), 96 * grid[1], (3, 3), tall=96 * grid[0])
    picture = render(scene)
    inputs = processor(images=[Image.fromarray(picture)], text=["<image>\nwhat?"], return_tensors="pt")
    tiles = cut(picture).permute(0, 3, 1, 2)
    assert inputs["pixel_values"].shape == (1, 1 + grid[0] * grid[1], 3, 96, 96)
    torch.testing.assert_close(inputs["pixel_values"][0], (tiles / 255 - 0.5) / 0.5)
    assert (inputs["input_ids"] == model.config.image_token_id).sum() == tokens
    features = torch.randn(1, len(tiles), 144, 128)
    packed, _ = model.model.pack_image_features(
        list(features), inputs["image_sizes"], "default", model.model.image_newline
    )
    torch.testing.assert_close(stitch(features, grid, model.model.image_newline)[0], packed[0])


def test_labels_follow_the_sequence():
    from vlmprune.eval.training.common.language import Prompts
    from vlmprune.eval.training.common.tokenizer import build_tokenizer
    from vlmprune.eval.training.next.batches import TilePlan

    plan = TilePlan(2, turns=(("attribute", 1), ("relation", 1)))
    batch = make_batch(plan, Prompts(build_tokenizer()), np.random.default_rng(0))
    packed = stitch(batch.tile_labels.transpose(2, 3).float(), batch.grid, torch.zeros(5)).long().transpose(1, 2)
    for kind in (0, 1, 2, 4):
        assert torch.equal(packed[:, kind], batch.labels[:, kind])
    named = ~batch.places.isnan().any(-1)
    assert named.flatten(1).sum(1).ge(3).all()
    assert batch.places[named].gt(0).all()
    assert batch.places[named].lt(1).all()


def test_answers_need_the_picture(model, processor):
    rows = load_rows().select(range(10))
    full = measure(model, processor, rows, batch_size=10, tasks=("attribute",))["attribute"]
    blind = measure(model, processor, rows, "blind", batch_size=10, tasks=("attribute",))["attribute"]
    assert full >= 0.8
    assert blind <= full - 0.4
