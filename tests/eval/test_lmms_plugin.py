"""``lmms-eval --model vlmprune``: what lmms-eval finds and builds from ``--model_args``."""

from __future__ import annotations

import pytest

pytest.importorskip("lmms_eval")

from lmms_eval.evaluator import simple_evaluate
from lmms_eval.models import MODEL_REGISTRY_V2, get_model
from lmms_eval.tasks import TaskManager

import vlmprune
from vlmprune.errors import BudgetError, NotAppliedError, ParameterError, UnknownNameError
from vlmprune.eval.accuracy.live_model import LiveModel
from vlmprune.eval.accuracy.plugin_entry import manifest
from vlmprune.eval.accuracy.task_index import find_tasks
from vlmprune.eval.accuracy.task_scores import evaluate_tasks, quiet_lmms_eval
from vlmprune.eval.plugin.model import Vlmprune


@pytest.fixture(scope="module", autouse=True)
def registered():
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


def run_by_name(model_folder, task_folder, task, arguments, **settings):
    manager = TaskManager(include_path=str(task_folder), include_defaults=False, model_name="vlmprune")
    with quiet_lmms_eval():
        return simple_evaluate(
            "vlmprune",
            model_args=f"pretrained={model_folder},{arguments}",
            tasks=[task],
            task_manager=manager,
            batch_size="2",
            bootstrap_iters=0,
            **settings,
        )


def test_the_class_is_found():
    assert get_model("vlmprune") is Vlmprune
    assert get_model("vlmprune", force_simple=True) is Vlmprune


def test_multiple_choice_needs_no_flag_and_equals_a_run_by_hand(model_folder, task_folder, toy):
    by_name = run_by_name(model_folder, task_folder, "toy_choice", "method=divprune,keep=8")
    with quiet_lmms_eval():
        tasks = find_tasks(["toy_choice"], "llava", [str(task_folder)])
    model = toy.model()
    with vlmprune.pruned(model, "divprune", keep=8):
        by_hand = evaluate_tasks(LiveModel(model, toy.processor(), pruned=True), tasks, None, 0)
    losses = [[round(loss, 4) for loss, _ in sample["filtered_resps"]] for sample in by_name["samples"]["toy_choice"]]
    assert losses == [sample["answer"] for sample in by_hand["toy_choice"].samples]
    assert by_name["results"]["toy_choice"]["acc,none"] == by_hand["toy_choice"].score


def test_messages_that_a_task_makes_are_asked_for(model_folder, task_folder):
    (task_folder / "toy_messages.yaml").write_text(
        (task_folder / "toy.yaml").read_text().replace("task: toy", "task: toy_messages")
        + "doc_to_messages: !function toy_messages_utils.messages\n"
    )
    (task_folder / "toy_messages_utils.py").write_text(
        "def messages(doc):\n"
        "    parts = [{'type': 'image', 'url': doc['image']}, {'type': 'text', 'text': 'how many ring ?'}]\n"
        "    return [{'role': 'user', 'content': parts}]\n"
    )
    messages = run_by_name(model_folder, task_folder, "toy_messages", "method=full", limit=2)
    plain = run_by_name(model_folder, task_folder, "toy", "method=full", limit=2)
    tokens = [
        run["samples"][name][0]["token_counts"][0]["input_tokens"]
        for run, name in ((messages, "toy_messages"), (plain, "toy"))
    ]
    assert tokens == [64 + 9, 64 + 11]


def test_what_requests_cost_is_in_the_results(model_folder, task_folder, toy):
    full = run_by_name(model_folder, task_folder, "toy", "method=full", limit=4)
    pruned = run_by_name(model_folder, task_folder, "toy", "method=divprune,keep=8", limit=4)
    for run, after in ((full, 64), (pruned, 8)):
        means = run["throughput"]
        assert means["avg_visual_tokens_before"] == 64
        assert means["avg_visual_tokens_after"] == after
        for sample in run["samples"]["toy"]:
            (counts,) = sample["token_counts"]
            assert counts["visual_tokens_after"] == after
            assert counts["input_tokens"] > after
            assert counts["flops"] > 0
        assert run["efficiency"]["overall"]["docs_with_token_counts"] == 4
    assert pruned["throughput"]["avg_gflops_to_first_token"] < full["throughput"]["avg_gflops_to_first_token"]
    assert pruned["throughput"]["avg_gflops_of_selecting"] > 0
    assert (
        pruned["throughput"]["avg_milliseconds_of_selecting"] > 0 == full["throughput"]["avg_milliseconds_of_selecting"]
    )


def test_a_run_by_name_equals_a_run_by_hand(model_folder, task_folder, toy):
    manager = TaskManager(include_path=str(task_folder), include_defaults=False, model_name="vlmprune")
    with quiet_lmms_eval():
        by_name = simple_evaluate(
            "vlmprune",
            model_args=f"pretrained={model_folder},method=divprune,keep=8",
            tasks=["toy"],
            task_manager=manager,
            batch_size="2",
            limit=4,
            bootstrap_iters=0,
        )
        tasks = find_tasks(["toy"], "llava", [str(task_folder)])
    assert by_name["config"]["model_args"].endswith("method=divprune,keep=8")
    model = toy.model()
    with vlmprune.pruned(model, "divprune", keep=8):
        by_hand = evaluate_tasks(LiveModel(model, toy.processor(), pruned=True), tasks, 4, 0)
    answers = [sample["filtered_resps"][0] for sample in by_name["samples"]["toy"]]
    assert answers == [sample["answer"] for sample in by_hand["toy"].samples]


def test_the_arguments_prune_the_model(model_folder):
    built = Vlmprune.create_from_arg_string(
        f"pretrained={model_folder},method=random,keep=0.25,seed=3", {"batch_size": "4"}
    )
    assert built.batch_size == 4
    assert vlmprune.remove(built._model) is built._model
    full = Vlmprune.create_from_arg_string(f"pretrained={model_folder},method=full")
    with pytest.raises(NotAppliedError):
        vlmprune.remove(full._model)


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        ("method=divprun", UnknownNameError),
        ("method=divprune,keep=1.5", BudgetError),
        ("method=random,sed=3", UnknownNameError),
        ("method=full,keep=0.5", ParameterError),
        ("method=pool,batch_size=auto", ParameterError),
    ],
)
def test_bad_arguments_are_refused(model_folder, arguments, error):
    with pytest.raises(error):
        Vlmprune.create_from_arg_string(f"pretrained={model_folder},{arguments}")
