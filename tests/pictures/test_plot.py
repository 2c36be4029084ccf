"""`vlmprune.plot`: panels of the latest prefill."""

import numpy as np
import pytest
import torch
from PIL import Image

import vlmprune
from support.families.real_processors import llava_processor, photograph
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import MissingExtraError, NoRunError
from vlmprune.eval.pictures.figure import figure_of
from vlmprune.eval.pictures.panels import stage_panels
from vlmprune.eval.pictures.tower_pictures import PictureError, tiles_of_image


@pytest.fixture(scope="module")
def setting():
    photo = Image.fromarray(photograph("coffee"))
    processor = llava_processor()
    inputs = processor(
        text=["what is <image> ?", "<image> a picture and <image> what ?"],
        images=[photo] * 3,
        padding=True,
        return_tensors="pt",
    )
    return LLAVA_CLIP_GQA.build(torch.float32), processor, inputs, photo


def titles(figure):
    return [axes.get_title() for axes in figure.axes if axes.get_title()]


def test_a_row_an_image_and_a_panel_a_stage(setting):
    model, processor, inputs, photo = setting
    with torch.no_grad(), vlmprune.pruned(model, "pyramiddrop", keep=0.6):
        model.generate(**inputs, max_new_tokens=2, do_sample=False, num_beams=2)
        stages = vlmprune.last_run(model).images[0].stages
        figure = vlmprune.plot(model, [photo] * 3, processor=processor, scores=True)
    assert titles(figure) == 3 * [*(f"pyramiddrop, layer {layer}" for layer, _ in stages[1:]), "pyramiddrop, scores"]
    captions = [axes.get_xlabel() for axes in figure.axes if axes.get_xlabel()]
    assert captions[: len(stages) - 1] == [f"{len(kept)} of 36 tokens" for _, kept in stages[1:]]


def test_scores_are_those_that_decided(setting):
    model, _, inputs, _ = setting
    for method in ("fastervlm", "fastv", "zooprune", "transprune", "hawk", "textmonkey"):
        with torch.no_grad(), vlmprune.pruned(model, method, keep=0.8):
            model(**inputs)
            for image in vlmprune.last_run(model).images:
                assert image.scores.shape == (image.total,)
                if method in ("fastervlm", "fastv", "hawk"):
                    entered = image.stages[-1][1] if method == "fastv" else image.kept
                    best = image.scores.topk(len(entered)).indices.sort().values
                    assert torch.equal(best, entered.sort().values), method


def test_merges_in_the_tower_are_coloured(setting):
    model, processor, inputs, photo = setting
    with torch.no_grad(), vlmprune.pruned(model, "tome", keep=0.6):
        model(**inputs)
        image = vlmprune.last_run(model).images[0]
    plain = tiles_of_image(processor, photo)
    (panel,) = stage_panels(image, plain, 1, "tome")
    changed = (panel.picture != plain[0]).any(-1).mean()
    assert 0.2 < changed < 1, "groups are tinted, what stayed alone is not"


def test_a_layout_without_geometry_is_a_bar(setting):
    model, processor, inputs, photo = setting
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    mask = inputs["input_ids"] == model.config.image_token_id
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        with vlmprune.options(model, visual_mask=mask):
            model(inputs_embeds=embeddings, attention_mask=inputs["attention_mask"])
        figure = vlmprune.plot(model, [photo] * 3, processor=processor)
    assert "no geometry" in figure.axes[0].get_xlabel()
    assert figure.axes[0].images[0].get_array().shape == (1, 36)


def test_mistakes_are_named(setting, monkeypatch):
    model, processor, inputs, photo = setting
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        with pytest.raises(NoRunError):
            vlmprune.plot(model, photo)
        model(**inputs)
        with pytest.raises(PictureError, match="2 pictures given, but the latest prefill saw 3"):
            vlmprune.plot(model, [photo, photo], processor=processor)
        with pytest.raises(PictureError, match="pass its processor"):
            vlmprune.plot(model, [photo] * 3)
        with pytest.raises(PictureError, match="'divprune' does not rank"):
            vlmprune.plot(model, [photo] * 3, processor=processor, scores=True)
        with pytest.raises(PictureError, match="A int is no picture"):
            vlmprune.plot(model, [photo, 7, photo], processor=processor)
        with pytest.raises(PictureError, match=r"'no\.png' is no picture"):
            vlmprune.plot(model, [photo, "no.png", photo], processor=processor)
        monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
        with pytest.raises(MissingExtraError, match=r"vlmprune\[eval\]"):
            vlmprune.plot(model, [photo] * 3, processor=processor)


def test_wide_pictures_stand_under_each_other():
    from vlmprune.eval.pictures.panels import Panel

    strips = [Panel(f"m{i}", "", np.zeros((10, 100, 3), dtype=np.uint8), np.ones(4, dtype=bool)) for i in range(3)]
    figure = figure_of([strips])
    assert len({axes.get_gridspec().ncols for axes in figure.axes}) == 1
    assert figure.axes[0].get_gridspec().nrows == 3


def test_a_record_reads_well(setting):
    model, _, inputs, _ = setting
    with torch.no_grad(), vlmprune.pruned(model, "fastervlm", keep=9):
        model(**inputs)
        assert str(vlmprune.last_run(model)).splitlines()[1:] == [
            f"row {row}, image: 36 -> 9 (25 %)" for row in (0, 1, 1)
        ]
        model(input_ids=torch.tensor([[3, 4]]))
        assert str(vlmprune.last_run(model)) == "fastervlm\nno images"
    with torch.no_grad(), vlmprune.pruned(model, "fastv", keep=0.8, layer=1):
        model(**inputs)
        assert (
            str(vlmprune.last_run(model)).splitlines()[1]
            == "row 0, image: 36 -> 36 at the entry, 25 from layer 1 (69 %)"
        )
