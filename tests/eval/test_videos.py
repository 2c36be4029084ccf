"""Videos in the evaluation: files and frames, tasks on clips through lmms-eval, records and costs."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText

pytest.importorskip("lmms_eval")
pytest.importorskip("av")

import av
from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2
from lmms_eval.tasks import TaskManager
from torch.utils.flop_counter import FlopCounterMode

import vlmprune
from support.tiny_configs import tiny_config
from vlmprune.errors import UnsupportedCallError
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.plugin_entry import manifest
from vlmprune.eval.accuracy.questions import Question, Turn, from_lmms_messages, user_turn
from vlmprune.eval.accuracy.request_records import request_records
from vlmprune.eval.accuracy.task_index import EMBEDDED, VIDEO_TASKS, find_tasks
from vlmprune.eval.accuracy.task_scores import evaluate_tasks, quiet_lmms_eval
from vlmprune.eval.accuracy.videos import Video, VideoReadError, even_frames, is_video, read_video, to_video
from vlmprune.eval.flops import request_cost, vision_cost
from vlmprune.eval.models.loading import load_model
from vlmprune.eval.models.random_weights import build_random
from vlmprune.eval.models.synthetic_request import for_model, synthetic_request
from vlmprune.eval.models.visual_tokens import visual_tokens
from vlmprune.eval.run.cells import Cell
from vlmprune.eval.speed.ideal_prefill import encode_images
from vlmprune.eval.speed.latency import measure

SERVED = ("qwen2_vl", "qwen2_5_vl", "qwen3_vl", "llava_onevision", "llava_next_video")


@pytest.fixture(scope="module")
def clip_file(tmp_path_factory):
    """A second of 10 frames, each a little lighter than the one before."""
    path = tmp_path_factory.mktemp("clips") / "lighter.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 96, 64, "yuv420p"
        for number in range(10):
            picture = np.full((64, 96, 3), 20 * number + 20, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def loaded():
    return load_model("tiny-qwen2.5-vl", "float32", "cpu")


def test_files_are_read_evenly(clip_file):
    video = read_video(str(clip_file), 4)
    assert video.frames.shape == (4, 64, 96, 3)
    assert np.abs(video.frames.mean((1, 2, 3)) - (20 * np.array([0, 3, 6, 9]) + 20)).max() < 8
    assert video.fps == pytest.approx(4)
    assert read_video(str(clip_file), 99).fps == pytest.approx(10)
    assert even_frames(3, 8) == [0, 1, 2]
    assert video.metadata()["frames_indices"] == [0, 1, 2, 3]


def test_what_is_no_video_is_named(tmp_path):
    assert is_video("a/b.MP4")
    assert not is_video("a/b.png")
    assert not is_video(Image.new("RGB", (2, 2)))
    empty = tmp_path / "empty.mp4"
    empty.write_bytes(b"")
    for path in (empty, tmp_path / "missing.mp4"):
        with pytest.raises(VideoReadError, match=path.name):
            read_video(str(path))
    with pytest.raises(UnsupportedCallError, match="'int'"):
        to_video(3)
    with pytest.raises(UnsupportedCallError, match="'audio'"):
        from_lmms_messages([{"role": "user", "content": [{"type": "audio", "url": "x.wav"}]}])


def test_pictures_and_videos_stay_in_order(clip_file):
    picture = Image.new("RGB", (32, 32))
    turn = user_turn("what is shown?", [picture, str(clip_file), {"frames": [picture] * 3, "fps": 2}], frames=5)
    assert [part["type"] for part in turn.messages[0]["content"]] == ["image", "video", "video", "text"]
    assert [len(video.frames) for video in turn.videos] == [5, 3]
    assert len(turn.images) == 1


def test_a_mixed_batch_answers_as_its_rows_do_and_is_recorded(loaded, clip_file):
    live = LiveModel(loaded.model, loaded.processor, video_frames=6)
    picture, video = Image.new("RGB", (64, 64), (200, 30, 30)), read_video(str(clip_file), 6)
    turns = [
        user_turn("what colour is the circle?", [picture, video]),
        user_turn("how many circles?", [video]),
        user_turn("how many circles?", []),
    ]
    together, first = live.reply(turns, 4)
    records = live.records
    assert [record.visual_before for record in records] == [16 + 3 * 24, 3 * 24, 0]
    assert records[0].work.grids == ((1, 8, 8), (3, 8, 12))
    assert records[2].work.grids == ()
    for row, turn in enumerate(turns):
        live.reset()
        alone, log_probabilities = live.reply([turn], 4)
        assert alone[0] == together[row]
        torch.testing.assert_close(log_probabilities[0], first[row], atol=1e-4, rtol=1e-4)
        assert live.records[0].visual_before == records[row].visual_before


def test_embedded_clip_tasks_run_pruned_and_are_counted(loaded):
    assert {path.stem for path in EMBEDDED.glob("video_*.yaml")} == set(VIDEO_TASKS)
    with quiet_lmms_eval():
        tasks = find_tasks(["video"], "qwen2_5_vl")
    assert list(tasks) == list(VIDEO_TASKS)
    live = LiveModel(loaded.model, loaded.processor, batch_size=2)
    with vlmprune.pruned(loaded.model, "uniform", keep=0.5):
        live.reset(pruned=True)
        scores = evaluate_tasks(live, tasks, 2, 0)
    assert all(score.items == 2 for score in scores.values())
    for record in live.records:
        ((total, kept),) = record.images
        frames = record.work.grids[0][0]
        assert total == record.visual_before == 25 * frames
        assert kept == round(0.5 * total) == record.visual_per_layer[0]


def test_a_smaller_picture_is_no_answer_to_a_video(loaded):
    cell = Cell("lower_resolution", 0.5)
    live = LiveModel(loaded.model, loaded.processor, resolution=cell.resolution(loaded.model, loaded.processor))
    with pytest.raises(UnsupportedCallError, match="not videos"):
        live.encode_turns([("?", [Video(np.zeros((4, 64, 64, 3), np.uint8), 2.0)])])


def test_lmms_eval_runs_a_local_clip_by_name(clip_file, tmp_path):
    (tmp_path / "rows.json").write_text(json.dumps([{"video": str(clip_file), "question": "how many circles?"}] * 2))
    (tmp_path / "utils.py").write_text("def visual(doc):\n    return [doc['video']]\n")
    (tmp_path / "local_clip.yaml").write_text(
        f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {tmp_path / 'rows.json'}\n"
        "task: local_clip\ntest_split: test\noutput_type: generate_until\ndoc_to_visual: !function utils.visual\n"
        "doc_to_text: question\ndoc_to_target: question\ngeneration_kwargs:\n  max_new_tokens: 3\n"
        "metric_list:\n  - metric: exact_match\n    aggregation: mean\n    higher_is_better: true\n"
    )
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)
    manager = TaskManager(include_path=str(tmp_path), include_defaults=False, model_name="vlmprune")
    with quiet_lmms_eval():
        result = simple_evaluate(
            "vlmprune",
            model_args="pretrained=tiny-qwen2.5-vl,method=divprune,keep=0.25,video_frames=8,dtype=float32",
            tasks=["local_clip"],
            task_manager=manager,
            batch_size="2",
            bootstrap_iters=0,
        )
    assert len(result["samples"]["local_clip"]) == 2
    assert all(sample["filtered_resps"][0] for sample in result["samples"]["local_clip"])


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


@pytest.mark.parametrize("frames", [2, 6])
@pytest.mark.parametrize("model_type", SERVED)
def test_requests_with_videos_match_the_counter(model_type, frames):
    config = tiny_config(model_type)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    inputs = synthetic_request(config, (64, 96), 15, batch_size=2, video_frames=frames)
    work, same = vision_cost(config).work(config, inputs, [0, 0], [1, 1])
    assert work == same
    assert counted(lambda: encode_images(model, inputs)) == 2 * 2 * sum(vision_cost(config).macs(config, work))
    visual = int(visual_tokens(config, inputs["input_ids"][0]).sum())
    text = inputs["input_ids"].shape[1] - visual
    cost = request_cost(config, work, [visual] * 3, text)
    assert counted(lambda: model(**inputs, logits_to_keep=1)) == 2 * 2 * cost.total


@pytest.mark.parametrize("model_type", ["qwen2_5_vl", "llava_onevision", "llava_next_video"])
def test_pruned_requests_with_videos_match_the_counter(model_type):
    config = tiny_config(model_type)
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    inputs = synthetic_request(config, (64, 96), 15, video_frames=6)
    question = Question(0, "", 0, Turn([], [], [Video(np.zeros((6, 96, 64, 3), np.uint8), 2.0)]), True)
    with vlmprune.pruned(model, "uniform", keep=0.25):
        total = counted(lambda: model(**inputs, logits_to_keep=1))
        (record,) = request_records(model, True, [question], inputs, [0])
    cost = request_cost(config, record.work, record.visual_per_layer, record.text_tokens)
    assert record.visual_per_layer[0] < record.visual_before
    assert total == 2 * cost.total


def test_latency_of_a_video():
    config = tiny_config("qwen2_5_vl")
    model = build_random(config, "float32", "cpu")
    inputs = for_model(synthetic_request(config, (64, 64), 15, video_frames=4), model)
    full, pruned = measure(model, inputs, (64, 64), [Cell(), Cell("uniform", 0.25)], 3, 0.0)
    assert full.visual_tokens_before == full.visual_tokens_after == 128
    assert pruned.visual_tokens_after == 32
    assert pruned.kv_cache_bytes < full.kv_cache_bytes
    assert full.vision["median"] > 0


def test_models_without_videos_are_named():
    with pytest.raises(UnsupportedCallError, match="'llava' take no videos"):
        synthetic_request(tiny_config("llava"), (32, 32), 9, video_frames=4)
