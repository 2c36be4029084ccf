"""TokenCorrCompressor on tiles, and its own count in the record."""

import pytest
import torch

import vlmprune
from support import method_batches as build
from support.families.llava_next import CASES
from vlmprune.errors import ParameterError
from vlmprune.methods import TokenCorr


def test_the_thumbnail_stays_whole_and_crops_keep_their_own_counts():
    method = TokenCorr(sim_threshold=0.99, min_count=2)
    layout = build.anyres_layout((2, 2), 4, 100, 150)
    batch = build.random_batch(method, [layout, build.raster_layout(3, 4)], 1)
    selection = method.select(batch)
    kept, other = build.kept_per_image(selection)
    tiles = build.tiles_of(kept, layout)
    whole = build.tiles_of(torch.arange(layout.total), layout)
    assert tiles[0] == whole[0]
    assert tiles[-1] == 0
    assert len(set(tiles[1:-1])) > 1
    assert 0 < len(other) <= 12
    assert selection.counts == (len(kept), len(other))


def test_the_record_has_the_count_that_the_image_asked_for():
    family = CASES[0]
    model, inputs = family.build(torch.float32), family.inputs([[3, "A", 4], [2, "large", 1]])
    with torch.no_grad(), vlmprune.pruned(model, "tokencorr", sim_threshold=0.3, min_count=2):
        model.generate(**inputs, max_new_tokens=3, do_sample=False)
        run = vlmprune.last_run(model)
    for row, image in enumerate(run.images):
        assert 0 < len(image.kept) < image.total
        assert run.visual_tokens_per_layer[row] == [len(image.kept)] * len(run.visual_tokens_per_layer[row])


def test_bad_parameters_are_refused():
    with pytest.raises(ParameterError, match="sim_threshold"):
        TokenCorr(sim_threshold=1.5)
    with pytest.raises(ParameterError, match=r"low_layer=10.*0 to 9; nearest: 9"):
        TokenCorr(low_layer=10).vision_signals(build.WITH_CLS)
