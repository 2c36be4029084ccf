"""The text tower that goes with a shipped model: what it finds, the methods that use it, its training, the commands."""

from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

from transformers import AutoModelForImageTextToText, AutoProcessor, CLIPModel

import vlmprune
from vlmprune.errors import ParameterError
from vlmprune.eval.bench import BenchOptions, cells_for, open_model
from vlmprune.eval.run.cells import make_cells, parse_methods
from vlmprune.eval.run.text_towers import equipped, text_tower_of
from vlmprune.eval.training.common.dataset import load_rows
from vlmprune.eval.training.common.scenes import make_scene, patch_labels
from vlmprune.eval.training.text_tower import measure as measuring
from vlmprune.eval.training.text_tower.asked import asked_patches
from vlmprune.eval.training.text_tower.learn import Lesson
from vlmprune.eval.training.text_tower.pictures import TILES
from vlmprune.eval.training.text_tower.train import train

CHECKPOINTS = Path(__file__).parents[2] / "eval" / "checkpoints"
LLAVA = CHECKPOINTS / "tiny-llava"
DIRECT = {"cdpruner": {"similarity": "direct"}, "recoverable_compression": {"mode": "fixed"}}


@pytest.fixture(scope="module")
def llava():
    model = AutoModelForImageTextToText.from_pretrained(LLAVA, dtype=torch.float32).eval()
    return model, AutoProcessor.from_pretrained(LLAVA)


@pytest.mark.parametrize("name", TILES)
def test_patches_that_the_question_asks_for_score_higher(name):
    folder = CHECKPOINTS / name
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype=torch.float32)
    found = measuring.measure(folder / "text_tower", model.model.vision_tower, name, -2, 3)
    assert all(area > 0.85 for figures in found.values() for area in figures.values())


@pytest.mark.parametrize("name", DIRECT)
def test_kept_tokens_are_on_what_the_question_asks_for(name, llava):
    model, processor = llava
    parameters = {"text_tower": LLAVA / "text_tower", "tokenizer": processor, **DIRECT[name]}
    rows = load_rows()
    scenes = list(islice(measuring._test_scenes(), 6))
    kept_share, share, differs = [], [], False
    with torch.no_grad(), vlmprune.pruned(model, name, keep=0.1, **parameters):
        for number, (scene, questions) in enumerate(scenes):
            labels, kept = torch.from_numpy(patch_labels(scene))[None], {}
            for task in ("attribute", "counting", "reading"):
                assert rows[number][f"{task}_question"] == questions[task]
                text = f"USER: <image>\n{questions[task]} ASSISTANT:"
                model(**processor(images=rows[number]["image"], text=text, return_tensors="pt"))
                kept[task] = vlmprune.last_run(model).images[0].kept
                wanted = asked_patches(questions[task], labels)[0][0]
                kept_share.append(wanted[kept[task]].float().mean())
                share.append(wanted.float().mean())
            differs |= not torch.equal(kept["attribute"], kept["reading"])
    # A patch that is asked for is kept at least twice as often as one by chance.
    assert torch.stack(kept_share).mean() > 2 * torch.stack(share).mean()
    assert differs


def test_patches_of_a_question():
    scene = make_scene(np.random.default_rng(3))
    labels = torch.from_numpy(patch_labels(scene))[None]
    thing = scene.things[0]
    found, shown = asked_patches(f"is there a {thing.name}?", labels)
    assert torch.equal(found[0], (labels[0, 0] == thing.shape + 1) & (labels[0, 1] == thing.colour + 1))
    assert shown.tolist() == [True]
    printed, _ = asked_patches("what does the text say?", labels)
    assert torch.equal(printed, labels[:, 2] > 0)


def test_training_leaves_the_vision_tower_as_it_is(tmp_path):
    found = train("tiny-llava", tmp_path, 2, Lesson(steps=2, tiles=2), 1)
    trained = CLIPModel.from_pretrained(tmp_path).vision_model.state_dict()
    shipped = CLIPModel.from_pretrained(LLAVA / "text_tower").vision_model.state_dict()
    model = AutoModelForImageTextToText.from_pretrained(LLAVA)
    for name, value in model.model.vision_tower.state_dict().items():
        name = name.removeprefix("vision_model.")
        assert torch.equal(value, trained[name])
        assert torch.equal(value, shipped[name])
    assert set(found) == set(measuring.WAYS)
    assert "# The text tower of tiny-llava\n" in (tmp_path / "README.md").read_text()


def test_the_shipped_tower_is_found_and_another_can_be_named():
    assert text_tower_of(str(LLAVA)) == str(LLAVA / "text_tower")
    assert text_tower_of(str(LLAVA), "openai/clip") == "openai/clip"
    assert text_tower_of("llava-hf/llava-1.5-7b-hf") is None
    methods = parse_methods("cdpruner:text_tower=mine,recoverable_compression,divprune")
    given = {cell.label: cell.arguments for cell in equipped(make_cells(methods, [4], 0), "own", "words")}
    assert given["cdpruner:text_tower=mine keep=4"] == {"text_tower": "mine", "tokenizer": "words"}
    assert given["recoverable_compression"] == {"text_tower": "own", "tokenizer": "words"}
    assert given["divprune keep=4"] == {}


def test_bench_serves_methods_that_need_the_tower(tmp_path):
    methods = [("cdpruner", {}), ("recoverable_compression", {})]
    options = BenchOptions("tiny-llava", methods, [0.5], ["scenes_reading"], tmp_path, baselines=False)
    cells, left_out = cells_for(options, open_model(options))
    assert [cell.label for cell in cells[1:]] == [
        "cdpruner keep=0.5",
        "recoverable_compression",
        "recoverable_compression keep=0.5",
    ]
    assert not left_out


@pytest.mark.parametrize(
    ("source", "words"), [(str(LLAVA), "lacks .* weights"), ("no/such/folder", "cannot be loaded")]
)
def test_what_is_no_clip_model_is_refused(source, words, llava):
    model, processor = llava
    with pytest.raises(ParameterError, match=rf"text_tower='{source}' {words}.*allowed: a folder or hub name"):
        vlmprune.apply(model, "cdpruner", text_tower=source, tokenizer=processor)
