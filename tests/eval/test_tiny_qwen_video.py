"""The shipped tiny-qwen2.5-vl-video and the clips: the test set, what training prepares, right answers, none without the clip."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

pytest.importorskip("datasets")

from vlmprune.eval.accuracy.videos import Video, processor_arguments
from vlmprune.eval.training.common.dataset import load_rows, sha256
from vlmprune.eval.training.common.scenes import is_test_string
from vlmprune.eval.training.qwen.tokenizer import VisionPrompts, build_tokenizer
from vlmprune.eval.training.qwen.tower import pack
from vlmprune.eval.training.video.batches import ClipPlan, make_batch
from vlmprune.eval.training.video.clips import FRAMES, KINDS, SIZE, make_clip, render_clip
from vlmprune.eval.training.video.dataset import CLIP_FILE, CLIP_SHA256, make_rows
from vlmprune.eval.training.video.evaluate import measure, prompt
from vlmprune.eval.training.video.labels import EVENTS, clip_labels
from vlmprune.eval.training.video.language import clip_layout
from vlmprune.eval.training.video.model import FPS
from vlmprune.eval.training.video.questions import CLIP_TASKS, WORDS

FOLDER = Path(__file__).parents[2] / "eval" / "checkpoints" / "tiny-qwen2.5-vl-video"


@pytest.fixture(scope="module")
def model():
    return AutoModelForImageTextToText.from_pretrained(FOLDER, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def processor():
    return AutoProcessor.from_pretrained(FOLDER)


@pytest.fixture(scope="module")
def rows():
    return load_rows(CLIP_FILE)


def test_the_shipped_clips_are_made_again(rows):
    assert sha256(CLIP_FILE) == CLIP_SHA256
    made = make_rows(len(rows)).select(range(3))
    for name in made.column_names:
        if name != "frames":
            assert made[name] == rows.select(range(3))[name]
    for new, old in zip(made["frames"], rows.select(range(3))["frames"], strict=True):
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(new, old, strict=True))


def test_no_answer_is_more_often_right_than_others(rows):
    for task, most in (("motion", 0.17), ("order", 0.17), ("counting", 0.25), ("reading", 0.03), ("happened", 0.5)):
        answers = [answer for answer in rows[f"{task}_answer"] if answer]
        assert max(Counter(answers).values()) / len(answers) <= most
        assert len(answers) >= 120
    assert all(is_test_string(text) for text in rows["reading_answer"])


@pytest.mark.parametrize("kind", KINDS)
def test_clips_hold_still_and_show_their_string_once(kind):
    still = 0
    for number in range(20):
        clip = make_clip(np.random.default_rng(number), kind, 8)
        pictures, order = render_clip(clip)
        assert len(order) == FRAMES * 8
        assert all(picture.shape == (SIZE, SIZE, 3) for picture in pictures)
        assert order.count(order[clip.text_frame]) == 1
        still += sum(a == b for a, b in zip(order[FRAMES::FRAMES], order[:-FRAMES:FRAMES], strict=True))
    assert still > 20


def test_questions_follow_what_happens():
    for number in range(20):
        rng = np.random.default_rng(number)
        clip = make_clip(rng, KINDS[number % 2], 6)
        asked = {task: ask(clip, rng) for task, ask in CLIP_TASKS.items()}
        moved, came = sum(actor.moves for actor in clip.actors), len(clip.arrivals)
        assert (moved, came) == ((1, 0) if clip.kind == "motion" else (0, came))
        assert (asked["motion"] is None) == (moved == 0)
        assert (asked["counting"] is None) == (came == 0)
        assert (asked["order"] is None) == (came < 2)
        _, tokens, events, ranks, ways = clip_labels(clip)
        assert ranks.max() <= came
        assert (np.abs(ways).max() > 0) == bool(moved)
        assert set(np.unique(events[tokens[:, 0] > 0])) <= set(range(1, len(EVENTS)))
        assert (events[tokens[:, 0] == 0] == 0).all()


def test_training_prepares_clips_and_positions_as_the_host_does(model, processor):
    prompts = VisionPrompts(build_tokenizer(WORDS))
    batch = make_batch(ClipPlan(100), prompts, np.random.default_rng(1))
    slices = batch.pixels[batch.shown[0]]
    video = Video(slices.flatten(0, 1).numpy(), FPS)
    text = [prompt(processor, "what moved?")]
    inputs = processor(text=text, return_tensors="pt", **processor_arguments([video]))
    assert torch.allclose(inputs["pixel_values_videos"], pack(slices), atol=1e-5)
    assert inputs["input_ids"][0, : len(prompts.prefix)].tolist() == prompts.prefix
    positions, _ = model.model.get_rope_index(
        inputs["input_ids"],
        inputs["mm_token_type_ids"],
        video_grid_thw=inputs["video_grid_thw"],
        second_per_grid_ts=inputs["second_per_grid_ts"],
    )
    _, laid_out = clip_layout(len(prompts.prefix), batch.moments, 5, len(prompts.suffix), 1)
    assert torch.equal(laid_out[:, :, : inputs["input_ids"].shape[1]], positions)


def test_folder_is_small_and_answers_need_the_clip(model, processor, rows):
    assert sum(file.stat().st_size for file in FOLDER.iterdir()) < 12_000_000
    assert "One frame" in (FOLDER / "README.md").read_text()
    few, tasks = rows.select(range(24)), ("motion", "order", "reading")
    seen = measure(model, processor, few, tasks=tasks)
    blind = measure(model, processor, few, "blind", tasks=tasks)
    assert all(seen[task] >= 0.7 for task in tasks)
    assert all(blind[task] < 0.5 for task in tasks)
