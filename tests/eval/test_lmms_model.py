"""The lmms-eval model, through the real lmms-eval on a handful of items."""

from __future__ import annotations

import pytest
import torch

import vlmprune

pytest.importorskip("lmms_eval")

from vlmprune.errors import UnknownNameError
from vlmprune.eval.accuracy import task_index
from vlmprune.eval.accuracy.generation import cut_at, generation_settings
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.task_index import EMBEDDED, EMBEDDED_TASKS, TaskLoadError, find_tasks
from vlmprune.eval.accuracy.task_scores import evaluate_tasks, quiet_lmms_eval


@pytest.fixture(scope="module")
def tasks(task_folder):
    with quiet_lmms_eval():
        return find_tasks(["toy", "toy_choice", "toy_pair"], "llava", [str(task_folder)])


def answers(scores, task="toy"):
    return [sample["answer"] for sample in scores[task].samples]


def only(tasks, name):
    return {name: tasks[name]}


def test_answers_are_those_of_plain_generate(toy, tasks):
    model, processor = toy.model(), toy.processor()
    live = LiveModel(model, processor)
    scores = evaluate_tasks(live, only(tasks, "toy"), None, 0)
    documents = tasks["toy"].test_docs()
    expected = []
    for document in documents:
        prompt = f"USER : <image> {document['question']} ASSISTANT :"
        inputs = processor(text=prompt, images=document["image"], return_tensors="pt")
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)[0, inputs["input_ids"].shape[1] :]
        expected.append(processor.tokenizer.decode(tokens, skip_special_tokens=True))
    assert answers(scores) == expected
    assert len(set(expected)) > 1
    assert scores["toy"].items == len(documents)
    wanted = [float(answer.strip() == document["answer"]) for answer, document in zip(expected, documents, strict=True)]
    assert [sample["score"] for sample in scores["toy"].samples] == wanted


@pytest.mark.parametrize("method", [None, "random", "pool", "fastervlm", "divprune"])
@pytest.mark.parametrize("task", ["toy", "toy_choice", "toy_pair"])
def test_batch_sizes_give_identical_answers_and_counts(toy, tasks, method, task):
    model = toy.model()
    found = []
    for batch_size in (1, 4):
        live = LiveModel(model, toy.processor(), batch_size=batch_size, pruned=method is not None)
        if method is None:
            scores = evaluate_tasks(live, only(tasks, task), None, 0)
        else:
            with vlmprune.pruned(model, method, keep=0.2):
                scores = evaluate_tasks(live, only(tasks, task), None, 0)
        said = answers(scores, task) if task != "toy_choice" else []
        found.append((said, [s["score"] for s in scores[task].samples], live.records))
    assert found[0] == found[1]


def test_token_counts_are_recorded(toy, tasks):
    model = toy.model()
    live = LiveModel(model, toy.processor(), batch_size=4)
    evaluate_tasks(live, only(tasks, "toy"), 3, 0)
    assert [(r.visual_before, r.visual_per_layer, r.doc_id) for r in live.records] == [
        (64, (64,) * 3, i) for i in range(3)
    ]
    unpruned_text = [r.text_tokens for r in live.records]
    assert len(set(unpruned_text)) > 1
    assert all(1 <= r.new_tokens <= 4 for r in live.records)
    with vlmprune.pruned(model, "uniform", keep=16):
        live.reset(pruned=True)
        evaluate_tasks(live, only(tasks, "toy"), 3, 0)
    assert [(r.visual_before, r.visual_per_layer) for r in live.records] == [(64, (16,) * 3)] * 3
    assert [r.text_tokens for r in live.records] == unpruned_text
    live.reset(pruned=False)
    evaluate_tasks(live, only(tasks, "toy_pair"), 2, 0)
    assert [(r.visual_before, r.work.crops) for r in live.records] == [(128, 2)] * 2


def test_multiple_choice_takes_the_likeliest_continuation(toy, tasks):
    model, processor = toy.model(), toy.processor()
    live = LiveModel(model, processor, batch_size=3)
    scores = evaluate_tasks(live, only(tasks, "toy_choice"), None, 0)
    for sample, document in zip(scores["toy_choice"].samples, tasks["toy_choice"].test_docs(), strict=True):
        losses = []
        for choice in ("red", "yes", "two"):
            prompt = f"USER : <image> {document['question']} ASSISTANT : {choice}"
            inputs = processor(text=prompt, images=document["image"], return_tensors="pt")
            with torch.no_grad():
                losses.append(-model(**inputs).logits[0, -2].log_softmax(-1)[inputs["input_ids"][0, -1]].item())
        best = ("red", "yes", "two")[losses.index(min(losses))]
        assert sample["score"] == float(best == document["answer"])


def test_the_model_survives_and_limits_are_per_task(toy, tasks):
    model = toy.model()
    live = LiveModel(model, toy.processor())
    both = {name: tasks[name] for name in ("toy", "toy_pair")}
    first = evaluate_tasks(live, both, 2, 0)
    second = evaluate_tasks(live, both, 2, 0)
    assert {name: score.items for name, score in first.items()} == {"toy": 2, "toy_pair": 2}
    assert first == second


@pytest.mark.parametrize("where", ["generate", "forward"])
def test_a_crash_in_the_model_is_raised_and_not_scored(toy, tasks, where, monkeypatch):
    model = toy.model()

    def crash(*args, **kwargs):
        raise RuntimeError("out of luck")

    target = model if where == "generate" else model.model.language_model.layers[1]
    monkeypatch.setattr(target, where, crash)
    for name in ("toy", "toy_choice") if where == "forward" else ("toy",):
        with pytest.raises(RuntimeError, match="out of luck"):
            evaluate_tasks(LiveModel(model, toy.processor(), batch_size=2), only(tasks, name), None, 0)


def test_a_crash_while_pruned_leaves_the_model_as_it_was(toy, tasks, monkeypatch):
    model = toy.model()
    live = LiveModel(model, toy.processor())
    before = evaluate_tasks(live, only(tasks, "toy"), 2, 0)
    layer = model.model.language_model.layers[1]
    with monkeypatch.context() as patch:
        patch.setattr(layer, "forward", lambda *args, **kwargs: 1 / 0)
        with pytest.raises(ZeroDivisionError), vlmprune.pruned(model, "divprune", keep=0.1):
            evaluate_tasks(live, only(tasks, "toy"), 2, 0)
    assert evaluate_tasks(live, only(tasks, "toy"), 2, 0) == before


def test_unknown_tasks_name_the_nearest(task_folder):
    with quiet_lmms_eval(), pytest.raises(UnknownNameError, match="Did you mean 'scenes_reading'"):
        find_tasks(["scenes_readin"], "llava", [str(task_folder)])


def test_tasks_that_cannot_be_loaded_are_named(task_folder, monkeypatch):
    def offline(*args):
        raise ConnectionError("no way to the hub\ntraceback and all")

    monkeypatch.setattr(task_index, "get_task_dict", offline)
    with pytest.raises(TaskLoadError, match=r"'toy' cannot be loaded .*ConnectionError: no way to the hub$"):
        find_tasks(["toy"], "llava", [str(task_folder)])
    with pytest.raises(UnknownNameError, match="No task is named"):
        find_tasks([], "llava")


def test_embedded_tasks_are_those_with_a_file():
    assert {path.stem for path in EMBEDDED.glob("scenes_*.yaml")} == set(EMBEDDED_TASKS)
    assert len(EMBEDDED_TASKS) == 5


def test_settings_of_generation():
    assert generation_settings({"temperature": 0, "top_p": 0.5})["do_sample"] is False
    assert generation_settings({"temperature": 0.7, "top_p": 0.5})["top_p"] == 0.5
    assert generation_settings({})["max_new_tokens"] == 256
    assert cut_at("yes\n\nno.", ["\n\n"]) == "yes"
    assert cut_at("yes", None) == "yes"
