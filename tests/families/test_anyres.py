"""Layouts of anyres images against the host's own packing of feature maps that carry their coordinates."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import LlavaNextConfig, LlavaOnevisionConfig
from transformers.models.llava_next.modeling_llava_next import LlavaNextModel, image_size_to_num_patches
from transformers.models.llava_onevision.modeling_llava_onevision import LlavaOnevisionModel

from vlmprune.patches.families.anyres import AnyresImage, anyres_image, cropped_image

NEXT, ONEVISION = LlavaNextConfig(), LlavaOnevisionConfig()
SIZES = st.tuples(st.integers(1, 4000), st.integers(1, 4000))


def host_tokens(config, maps, size, max_crops=None):
    """Return what the host packs from `maps [tiles, side * side, channels]`, with -1 at newlines."""
    newline = torch.full((maps.shape[-1],), -1.0)
    host = SimpleNamespace(config=config)
    if isinstance(config, LlavaNextConfig):
        return LlavaNextModel.pack_image_features(host, [maps], torch.tensor([size]), "default", newline)[0][0]
    aspect = f"anyres_max_{max_crops or config.vision_aspect_ratio.removeprefix('anyres_max_')}"
    return LlavaOnevisionModel.pack_image_features(host, [maps], torch.tensor([size]), newline, aspect)[0][0]


def described(config, size, max_crops=None):
    """Return the project's own account of the image."""
    vision = config.vision_config
    if isinstance(config, LlavaOnevisionConfig):
        max_crops = max_crops or 9
    return anyres_image(size, config.image_grid_pinpoints, vision.image_size, vision.patch_size, max_crops)


def coordinate_maps(image):
    """Return tile, row, column, row and column in the stitched map of every patch, `[tiles, side * side, 5]`."""
    tile, row, column = torch.meshgrid(
        torch.arange(image.tiles), torch.arange(image.side), torch.arange(image.side), indexing="ij"
    )
    crop = (tile - 1).clamp(min=0)
    columns = image.crops[1] if image.crops else 1
    stitched = [crop // columns * image.side + row, crop % columns * image.side + column]
    if image.crops is not None:
        stitched = [values.masked_fill(tile == 0, -1) for values in stitched]
    return torch.stack([tile, row, column, *stitched], -1).flatten(1, 2).float()


def coordinates(layout):
    return torch.stack([layout.tile, layout.row, layout.column, layout.stitched_row, layout.stitched_column], 1)


def check(config, size, max_crops=None):
    image = described(config, size, max_crops)
    vision = config.vision_config
    assert image.tiles == image_size_to_num_patches(size, config.image_grid_pinpoints, vision.image_size)
    maps = coordinate_maps(image)
    tokens = host_tokens(config, maps, size, max_crops)
    layout = image.layout
    assert layout.total == len(tokens)
    assert layout.newline.tolist() == (tokens[:, 0] == -1).tolist()
    patches = ~layout.newline
    if image.resized is None:
        assert torch.equal(coordinates(layout)[patches].float(), tokens[patches])
    else:
        check_nearest(image, tokens)
    assert (coordinates(layout)[layout.newline][:, 1:] == -1).all()
    packed = image.pack(maps)
    torch.testing.assert_close(packed[patches], tokens[patches])
    assert torch.count_nonzero(packed[layout.newline]) == 0
    return image


def check_nearest(image, tokens):
    """Interpolated coordinates lie at most half a patch from the patch that the layout names."""
    layout, inside = image.layout, (image.layout.tile > 0) & ~image.layout.newline
    columns = image.crops[1]
    crop = layout.tile[inside] - 1
    row = crop // columns * image.side + layout.row[inside]
    column = crop % columns * image.side + layout.column[inside]
    assert (row - tokens[inside, 3]).abs().max() <= 0.501
    assert (column - tokens[inside, 4]).abs().max() <= 0.501
    rows, width = image.resized
    expected = torch.cartesian_prod(torch.arange(rows), torch.arange(width))
    assert torch.equal(torch.stack([layout.stitched_row, layout.stitched_column], 1)[inside], expected)
    assert torch.equal(coordinates(layout)[: image.side**2].float(), tokens[: image.side**2])


def near(height, width):
    """Sizes at and one pixel off a pinpoint, of the same shape but larger or smaller, and of another shape."""
    sizes = [(height + i, width + j) for i in (-1, 0, 1) for j in (-1, 0, 1)]
    return [*sizes, (height * 2, width * 2), (height // 2, width // 2), (height - 40, width), (height, width - 40)]


@pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=["next", "onevision"])
def test_every_pinpoint_as_the_host_packs_it(config):
    crops = set()
    for pinpoint in config.image_grid_pinpoints:
        for size in near(*pinpoint):
            crops.add(check(config, size).crops)
    tile = config.vision_config.image_size
    assert crops == {(height // tile, width // tile) for height, width in config.image_grid_pinpoints}


@pytest.mark.parametrize("config", [NEXT, ONEVISION], ids=["next", "onevision"])
@settings(max_examples=120, deadline=None)
@given(size=SIZES)
@example(size=(1, 4000))
@example(size=(4000, 1))
@example(size=(1, 1))
@example(size=(335, 337))
@example(size=(333, 1000))
@example(size=(2304, 2303))
def test_any_size_as_the_host_packs_it(config, size):
    check(config, size)


@settings(max_examples=60, deadline=None)
@given(size=SIZES, max_crops=st.integers(1, 20))
def test_interpolated_maps_as_the_host_packs_them(size, max_crops):
    check(ONEVISION, size, max_crops)


def test_an_image_of_one_tile_is_its_patches_and_one_newline():
    image = AnyresImage(27)
    maps = coordinate_maps(image)
    tokens = host_tokens(ONEVISION, maps, (500, 300))
    assert torch.equal(coordinates(image.layout)[:-1].float(), tokens[:-1])
    assert image.layout.newline.tolist() == [False] * 729 + [True]
    assert torch.equal(image.pack(maps)[:-1], tokens[:-1])
    assert image.layout.crops is None


def test_without_size_the_padding_stays():
    image = cropped_image((1, 2), 3, None)
    assert image.window == (0, 0, 3, 6)
    assert image.layout.total == 9 + 3 * 7
    assert image.layout.tile[-7:].tolist() == [1, 1, 1, 2, 2, 2, 2]


def test_the_published_counts():
    """LLaVA-NeXT's 2928 tokens of a square image, OneVision's 7290 at most."""
    assert described(NEXT, (672, 672)).layout.total == 576 + 48 * 49
    assert described(ONEVISION, (2304, 2304)).layout.total == 729 + 81 * 82
