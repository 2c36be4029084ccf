"""What a pruned model keeps and answers, against each method in plain loops over an unpatched model's own layers."""

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA

import vlmprune
from support.plain_language import run_row
from support.plain_methods.dart import dart
from support.plain_methods.mustdrop import mustdrop_filter
from support.plain_methods.sparsevlm import sparsevlm
from support.plain_methods.visiondrop_stages import visiondrop_stages
from vlmprune.methods import DART, MustDropFilter, SparseVLM, VisionDropStages

ROWS = {"single": [[3, "A", 6]], "three rows": [[3, "A", 6], [2, "B", 3, "C", 7], [2, "D", 5]]}
METHODS = {
    "dart": (DART(layer=2, tokens=16), dart(2, 20)),
    "dart-keep": (DART(layer=1, keep=0.3), dart(1, 7)),
    "sparsevlm": (SparseVLM(layers=(1, 3), tokens=(20, 8)), sparsevlm((1, 3), (20, 8))),
    "sparsevlm-few": (SparseVLM(layers=(2,), tokens=(1,)), sparsevlm((2,), (1,))),
    "sparsevlm-v2": (
        SparseVLM(layers=(1, 3), tokens=(20, 8), variant="v2", heads=3),
        sparsevlm((1, 3), (20, 8), heads=3),
    ),
    "visiondrop": (
        VisionDropStages(layers=(2, 4, 6), counts=((18, 3), (10, 3), (5, 1))),
        visiondrop_stages((2, 4, 6), ((18, 3), (10, 3), (5, 1))),
    ),
    "dart-few": (DART(layer=3, keep=14), dart(3, 1)),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", METHODS)
def test_kept_tokens_and_answers_are_those_of_plain_loops(name, rows):
    method, cut = METHODS[name]
    model, inputs = DEEP_LLAVA.build(torch.float32), DEEP_LLAVA.inputs(rows)
    with torch.no_grad(), vlmprune.pruned(model, method):
        logits = model(**inputs).logits
        record = vlmprune.last_run(model)
    for index in range(len(rows)):
        mine = [image for image in record.images if image.batch_index == index]
        row, expected = run_row(model, inputs, index, [image.total for image in mine], cut)
        assert [image.kept.tolist() for image in mine] == row.numbers
        torch.testing.assert_close(logits[index, -1], expected[-1], atol=2e-4, rtol=2e-4)


# With keep=0.5 of 36 tokens in 8 layers: 2 * 36 + 3 * 36 x + 3 * 36 x * x is 8 * 18 at x = 0.457.
FILTERS = {
    "thresholds": ({"global_threshold": 0.03, "individual_threshold": 0.05}, ()),
    "keep": ({"keep": 0.5}, (16, 8)),
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("name", FILTERS)
def test_mustdrop_filters_as_plain_loops_do(name, rows):
    """Protected tokens come of each picture in the unpatched tower."""
    parameters, counts = FILTERS[name]
    model, inputs = DEEP_LLAVA.build(torch.float32), DEEP_LLAVA.inputs(rows)
    method = MustDropFilter(layers=(1, 4), key_rate=0.1, **parameters)
    with torch.no_grad(), vlmprune.pruned(model, method):
        logits = model(**inputs).logits
        record = vlmprune.last_run(model)
    thresholds, done = (method.global_threshold, method.individual_threshold), 0
    for index in range(len(rows)):
        mine = [image for image in record.images if image.batch_index == index]
        pictures = list(inputs["pixel_values"][done : done + len(mine)].split(1))
        done += len(mine)
        cut = mustdrop_filter(pictures, (1, 4), thresholds, 0.1, counts)
        row, expected = run_row(model, inputs, index, [image.total for image in mine], cut)
        assert [image.kept.tolist() for image in mine] == row.numbers
        assert all(0 < len(image.kept) < image.total for image in mine)
        torch.testing.assert_close(logits[index, -1], expected[-1], atol=2e-4, rtol=2e-4)
