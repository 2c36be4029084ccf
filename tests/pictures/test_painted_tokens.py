"""Kept patches are clear and dropped ones faded, at the pixels that the tower read the token from.

The colour of every visual token is worked out a second time from the processor's output by the host's own packing.
"""

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from support.families.llava_onevision import LLAVA_ONEVISION
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen3_vl import QWEN3_VL
from support.families.real_processors import (
    QWEN_PATCH,
    clip,
    llava_processor,
    onevision_processor,
    photograph,
    qwen_processor,
    with_patches,
)
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.pictures.painting import DIMMED, group_colour, paint_kept
from vlmprune.eval.pictures.panes import ABSENT, panes_of
from vlmprune.eval.pictures.plot import patch_size_of, seen_by_tower

PROMPT = {
    "llava": "what is <image> ?",
    "next": "what is <image> ?",
    "onevision": "what is <image> ?",
    "onevision video": "what is <video> ?",
    "qwen": "what is <|vision_start|><|image_pad|><|vision_end|> ?",
    "qwen video": "what is <|vision_start|><|video_pad|><|vision_end|> ?",
    "qwen3": "what is <|vision_start|><|image_pad|><|vision_end|> ?",
}


def denormalized(part, pixels):
    mean, std = (torch.tensor(values)[:, None, None] for values in (part.image_mean, part.image_std))
    return (pixels.float() * std + mean) * 255


def patch_colours(pictures, size):
    """Mean colour of every patch, `[pictures, rows * columns, 3]`; what is left over at the edges is not read."""
    height, width = (edge // size for edge in pictures.shape[-2:])
    cut = pictures[..., : height * size, : width * size]
    return cut.unflatten(-1, (width, size)).unflatten(-3, (height, size)).mean((-1, -3)).flatten(2).mT


def packed_colours(part, patches):
    """Mean colour of every token of packed patches: four neighbours each."""
    values = patches.view(len(patches), 3, part.temporal_patch_size, part.patch_size, part.patch_size)[:, :, 0]
    return denormalized(part, values).mean((-1, -2)).view(-1, 4, 3).mean(1)


def opened(kind):
    """Return model, processor, what is shown, and the colour of every visual token, NaN at newlines."""
    photo = Image.fromarray(photograph("coffee")[:300])
    frames = clip("astronaut", 4)
    newline = torch.full((3,), torch.nan)
    if kind == "llava":
        model, processor = LLAVA_CLIP_GQA.build(torch.float32), llava_processor()
        pixels = processor.image_processor(photo, return_tensors="pt")["pixel_values"]
        return (
            model,
            processor,
            photo,
            patch_colours(denormalized(processor.image_processor, pixels), patch_size_of(model))[0],
        )
    if kind == "next":
        loaded = load_model("tiny-llava-next")
        model, processor, part = loaded.model, loaded.processor, loaded.processor.image_processor
        prepared = part(photo, return_tensors="pt")
        colours = patch_colours(denormalized(part, prepared["pixel_values"][0]), patch_size_of(model))
        packed, _ = model.model.pack_image_features([colours], prepared["image_sizes"], "default", newline)
        return model, processor, photo, packed[0]
    if kind.startswith("onevision"):
        model, processor = LLAVA_ONEVISION.build(torch.float32), onevision_processor()
        if kind.endswith("video"):
            part = processor.video_processor
            pixels = part(frames, return_tensors="pt")["pixel_values_videos"][0]
            colours = patch_colours(denormalized(part, pixels), patch_size_of(model))
            pooled = model.model.apply_pooling(colours)
            return model, processor, frames, torch.cat([pooled.flatten(0, 1), newline[None]])
        part = processor.image_processor
        prepared = part(photo, return_tensors="pt")
        colours = patch_colours(denormalized(part, prepared["pixel_values"][0]), patch_size_of(model))
        packed, _ = model.model.pack_image_features([colours], prepared["image_sizes"], newline, "anyres_max_2")
        return model, processor, photo, packed[0]
    name = "Qwen3VLProcessor" if kind == "qwen3" else "Qwen2_5_VLProcessor"
    processor = qwen_processor(name)
    model = with_patches(QWEN3_VL if kind == "qwen3" else QWEN2_5_VL, QWEN_PATCH[name])
    if kind.endswith("video"):
        part = processor.video_processor
        patches = part(frames, return_tensors="pt")["pixel_values_videos"]
        return model, processor, frames, packed_colours(part, patches)
    part = processor.image_processor
    return model, processor, photo, packed_colours(part, part(photo, return_tensors="pt")["pixel_values"])


@pytest.mark.parametrize("kind", list(PROMPT))
def test_every_token_is_drawn_where_the_tower_read_it(kind):
    model, processor, shown, colours = opened(kind)
    video = kind.endswith("video")
    inputs = processor(text=[PROMPT[kind]], return_tensors="pt", **({"videos" if video else "images": [shown]}))
    with torch.no_grad(), vlmprune.pruned(model, "random", keep=0.4):
        model(**inputs)
        (record,) = vlmprune.last_run(model).images
    assert record.total == len(colours)
    pictures = seen_by_tower(record.modality, shown, processor)
    panes = panes_of(record.layout, pictures, patch_size_of(model))
    alive = np.isin(np.arange(record.total), record.kept)
    interpolated = kind.startswith("onevision")
    drawn = set()
    for pane in panes:
        painted = paint_kept(pane, alive)
        for row, column in np.ndindex(pane.tokens.shape):
            token = pane.tokens[row, column]
            if token == ABSENT:
                continue
            drawn.add(int(token))
            own = colours[token].numpy()
            if not alive[token]:
                own = DIMMED * own + (1 - DIMMED) * 255
            found = painted[pane.cell(row, column)].reshape(-1, 3).mean(0)
            # Rounding to whole numbers; interpolated features have no edge of their own.
            assert np.abs(found - own).max() < (25 if interpolated else 1.0), (pane.title, row, column)
    assert drawn == set(torch.nonzero(~colours.isnan().any(-1)).flatten().tolist())


def test_merged_tokens_have_the_colour_of_their_group():
    layout_rows, side = 2, 4
    from vlmprune.eval.pictures.panes import Pane

    picture = np.full((layout_rows * side, 2 * side, 3), 100, dtype=np.uint8)
    pane = Pane("", picture, np.array([[0, 1], [2, 3]]))
    painted = paint_kept(pane, np.array([True, True, True, False]), np.array([0, 1, 0, -1]))
    assert (painted[:4, :4] == painted[4:, :4]).all(), "one group, one colour"
    assert np.abs(painted[0, 0] - (60 + 0.4 * group_colour(0))).max() <= 1
    assert (painted[:4, 4:] == 100).all(), "alone in its group: its own colours"
    assert (painted[4:, 4:] == round(100 * DIMMED + 255 * (1 - DIMMED))).all()
