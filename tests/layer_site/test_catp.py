"""CATP's counts and parameters, prompts of several images, and the example."""

import runpy
from pathlib import Path

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA

import vlmprune
from vlmprune.errors import BudgetError, ParameterError, UnsupportedCallError
from vlmprune.methods import CATP, CATPStages
from vlmprune.methods.input.catp import entering_share

EXAMPLE = Path(__file__).parents[2] / "examples" / "in_context.py"


@torch.no_grad()
def left_of(model, method, rows):
    with vlmprune.pruned(model, method):
        logits = model(**DEEP_LLAVA.inputs(rows)).logits
        return vlmprune.last_run(model), logits


def test_the_papers_counts():
    method = CATP(ratio=7 / 9)
    assert method.budget(576) == 352
    assert method.budget(2880) == 1760
    assert CATPStages(ratio=7 / 9).cut_layers(32) == (7, 8)
    assert CATPStages(ratio=7 / 9, layer=6).cut_layers(28) == (7, 8)
    assert CATPStages(ratio=7 / 9, layer=10).cut_layers(40) == (11, 12)
    assert [CATP(ratio=ratio).budget(576) for ratio in (2 / 3, 0.899)] == [384, 317]


def test_five_images_lose_what_the_ratio_says():
    model = DEEP_LLAVA.build(torch.float32)
    shots = [2, "A", 3, 4, "B", 5, 6, "C", 7, 8, "D", 9, 10]
    rows = [[1, *shots, "A", 11, 12], [*shots[::-1], "B", 4]]
    run, logits = left_of(model, CATP(ratio=7 / 9, layer=2), rows)
    for row in range(2):
        images = [image for image in run.images if image.batch_index == row]
        assert [len(image.stages[0][1]) for image in images] == [22] * 5
        assert sum(len(image.kept) for image in images[:-1]) == 32
        assert len(images[-1].kept) == 8
        assert run.visual_tokens_per_layer[row] == [110] * 3 + [32 + 22] + [40] * 4
        single, alone = left_of(model, CATP(ratio=7 / 9, layer=2), rows[row : row + 1])
        assert [image.kept.tolist() for image in single.images] == [image.kept.tolist() for image in images]
        torch.testing.assert_close(logits[row, -1], alone[0, -1], atol=2e-4, rtol=2e-4)


def test_a_single_image_has_its_own_text_for_context():
    model = DEEP_LLAVA.build(torch.float32)
    run, _ = left_of(model, CATP(ratio=7 / 9, layer=2), [[3, "A", 4, 7]])
    assert run.visual_tokens_per_layer == [[22] * 4 + [8] * 4]
    with pytest.raises(UnsupportedCallError, match="Row 0 has one image and no text behind it"):
        left_of(model, CATP(ratio=7 / 9, layer=2), [[3, "A"]])


@pytest.mark.parametrize("layers", [6, 28, 32, 40])
@pytest.mark.parametrize("keep", [0.3, 0.4, 0.6, 0.9])
def test_keep_is_the_average_over_layers(layers, keep):
    stages = CATP(keep=keep).parts()[1]
    entering = entering_share(keep)
    for cut in stages.cut_layers(layers):
        batch_share = (stages.keep * layers - cut) / (layers - cut)
        assert 0 < batch_share <= 1
        average = entering * (cut + (layers - cut) * batch_share) / layers
        assert average == pytest.approx(keep)


@torch.no_grad()
def test_keep_is_met_by_prompts():
    model, rows = DEEP_LLAVA.build(torch.float32), [[3, "A", 4, 7, "B", 2, 5]]
    for keep in (0.05, 0.4, 15):
        run, _ = left_of(model, CATP(keep=keep, layer=1), rows)
        wanted = 72 * keep if keep < 1 else 2 * keep
        assert sum(run.visual_tokens_per_layer[0]) / 8 == pytest.approx(wanted, abs=1.0)
    with pytest.raises(BudgetError, match="cannot be reached"):
        left_of(model, CATP(keep=0.3, layer=4), rows)


@pytest.mark.parametrize(
    ("parameters", "message"),
    [
        ({"keep": 0.2, "ratio": 0.5}, "keep=0.2 and ratio=0.5 both set the budget"),
        ({"ratio": 1.0}, r"ratio=1\.0; allowed: a number in \[0, 1\)"),
        ({"layer": 0}, "layer=0; allowed: an int >= 1"),
        ({"lambda1": -1.0}, r"lambda1=-1\.0"),
        ({"lambda2": float("nan")}, "lambda2=nan"),
    ],
)
def test_bad_parameters(parameters, message):
    with pytest.raises(ParameterError, match=message):
        CATP(**parameters)


def test_too_few_layers():
    with pytest.raises(ParameterError, match="has 3 layers; 'catp' cuts twice and needs at least 4"):
        CATPStages(ratio=0.5).cut_layers(3)
    with pytest.raises(ParameterError, match="layer holds 9, but the language model has 8 layers"):
        CATPStages(ratio=0.5, layer=7).cut_layers(8)


def test_the_example():
    run = runpy.run_path(str(EXAMPLE))["main"]()
    for row in range(2):
        images = [image for image in run.images if image.batch_index == row]
        assert [image.total for image in images] == [576] * 5
        assert sum(len(image.kept) for image in images[:-1]) == 4 * 192
        assert len(images[-1].kept) == 192
