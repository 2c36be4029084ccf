"""The foreground oracle on the shipped models: it keeps what shows something, and that is enough to answer."""

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor

import vlmprune
from vlmprune.eval.training.common.dataset import load_rows, make_scenes
from vlmprune.eval.training.common.evaluate import ORACLE_MODES, measure, measure_oracle, prompt
from vlmprune.eval.training.common.oracle import only_foreground, random_of_same_count
from vlmprune.eval.training.common.scenes import SHAPES, draw_background, render
from vlmprune.eval.training.train import PIPELINES

CHECKPOINTS = Path(__file__).parents[2] / "eval" / "checkpoints"
LEANS_ON_THE_BACKGROUND = ("tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl")
"""Models whose shipped weights were trained before background tokens were dropped in training."""
TASKS = ("attribute", "counting", "relation")


@pytest.fixture(scope="module", params=["tiny-llava", "tiny-llava-next", "tiny-qwen2.5-vl"])
def loaded(request):
    folder = CHECKPOINTS / request.param
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoProcessor.from_pretrained(folder)


def encode(processor, pictures):
    pictures = [Image.fromarray(picture) for picture in pictures]
    text = [prompt(processor, "how many circles?")] * len(pictures)
    return processor(images=pictures, text=text, padding=True, return_tensors="pt")


def changed(name, model, scene, processor):
    """How much of each visual token's own pixels the things and glyphs changed, `[tokens]`."""
    ground = draw_background(np.random.default_rng(scene.texture_seed), scene.size, scene.height)
    inputs = encode(processor, [render(scene), np.clip(ground, 0, 255).astype(np.uint8)])
    pixels = inputs["pixel_values"]
    if name == "tiny-qwen2.5-vl":
        with_things, without = (part.view(-1, 4, 3, 2, 64) for part in pixels.chunk(2))
        return ((with_things - without).abs().amax(2) > 0.02).float().mean((1, 2, 3))
    other = ((pixels[0] - pixels[1]).abs().amax(-3) > 0.02).float()
    other = other.unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8)).mean((-3, -1))
    if name == "tiny-llava":
        return other.flatten()
    features = [other.flatten(1)[..., None].expand(-1, -1, 128)]
    packed, _ = model.model.pack_image_features(features, inputs["image_sizes"][:1], "default", torch.zeros(128))
    return packed[0][:, 0]


def test_masks_are_where_things_and_glyphs_are_drawn(loaded):
    name, model, processor = loaded
    for scene, _ in make_scenes(3):
        share = changed(name, model, scene, processor)
        mask = PIPELINES[name].foreground(scene)
        assert mask.shape == share.shape
        thumbnail = torch.zeros_like(mask)
        if name == "tiny-llava-next":
            thumbnail[:144] = True
        assert mask[(share > 0.7) & ~thumbnail].all()
        holes = sum(SHAPES[thing.shape] == "ring" for thing in scene.things)
        assert mask[(share == 0) & ~thumbnail].sum() <= holes
        assert share[thumbnail & mask].min() > 0.1 if thumbnail.any() else True


def test_only_what_the_masks_say_is_kept(loaded):
    name, model, processor = loaded
    scenes = [scene for scene, _ in make_scenes(2)]
    masks = [PIPELINES[name].foreground(scene) for scene in scenes]
    inputs = encode(processor, map(render, scenes))
    with torch.no_grad(), only_foreground(model, masks):
        model(**inputs)
        kept = [image.kept for image in vlmprune.last_run(model).images]
    assert [part.tolist() for part in kept] == [mask.nonzero().flatten().tolist() for mask in masks]
    with torch.no_grad(), random_of_same_count(model, masks, seed=1):
        model(**inputs)
        drawn = [image.kept for image in vlmprune.last_run(model).images]
    assert list(map(len, drawn)) == list(map(len, kept))
    assert drawn[0].tolist() != kept[0].tolist()


def test_a_missing_mask_is_named(loaded):
    with pytest.raises(ValueError, match="'foreground', not one of full, blind, random"):
        measure(*loaded[1:], load_rows().select(range(1)), "foreground")


def test_the_foreground_is_enough(loaded):
    name, model, processor = loaded
    modes = ("full", *ORACLE_MODES)
    found = measure_oracle(model, processor, PIPELINES[name].foreground, 20, modes, batch_size=20, tasks=TASKS)
    full, foreground, same_count = (np.mean(list(found[mode].values())) for mode in modes)
    if name in LEANS_ON_THE_BACKGROUND:
        assert foreground < full - 0.03, f"{name} does not lean on the background any more: take it from the list"
        return
    assert foreground >= full - 0.03
    assert foreground >= same_count + 0.15
