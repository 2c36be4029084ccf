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
from vlmprune.eval.accuracy.plugin_model import SimpleVlmprune, Vlmprune
from vlmprune.eval.accuracy.task_index import find_tasks
from vlmprune.eval.accuracy.task_scores import evaluate_tasks, quiet_lmms_eval


@pytest.fixture(scope="module", autouse=True)
def registered():
    MODEL_REGISTRY_V2.register_manifest(manifest(), overwrite=True)


def test_both_classes_are_found():
    assert get_model("vlmprune") is Vlmprune
    assert get_model("vlmprune", force_simple=True) is SimpleVlmprune


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
