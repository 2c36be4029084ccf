"""What the plug-in refuses, with the reason; none of it needs vLLM."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from support.family_cases import FAMILY_CASES
from vlmprune.errors import (
    BudgetError,
    ParameterError,
    UnknownNameError,
    UnsupportedCallError,
    UnsupportedFamilyError,
    UnsupportedMethodError,
)
from vlmprune.methods.registry import known_methods
from vlmprune.patches.vllm.refusals import check_engine, served
from vlmprune.patches.vllm.registration import check_setting
from vlmprune.patches.vllm.served_models import SERVED_MODELS
from vlmprune.patches.vllm.settings import ServedMethod, read_setting

QWEN, LLAVA = "Qwen2_5_VLForConditionalGeneration", "LlavaForConditionalGeneration"


def config_of(architecture, setting):
    case = next(case for case in FAMILY_CASES if type(case.build(torch.float32)).__name__ == architecture)
    config = copy.deepcopy(case.build(torch.float32).config)
    config.vlmprune = setting
    if hasattr(config, "vision_aspect_ratio"):
        config.vision_aspect_ratio = "anyres_max_9"
    return config


def check(setting, architecture=QWEN, release="0.32.0"):
    check_setting(architecture, config_of(architecture, setting), release)


def test_without_a_setting_nothing_is_checked():
    check_setting("SomeOtherModel", SimpleNamespace(), "9.9")


@pytest.mark.parametrize("architecture", SERVED_MODELS)
def test_served(architecture):
    check({"method": "divprune", "keep": 0.25}, architecture)
    check({"method": "fastervlm", "keep": 64}, architecture)


@pytest.mark.parametrize(
    ("setting", "error", "says"),
    [
        ("divprune", ParameterError, "needed: a method"),
        ({"keep": 0.5}, ParameterError, "needed: a method"),
        ({"method": "divprun", "keep": 0.5}, UnknownNameError, "Did you mean 'divprune'"),
        ({"method": "divprune", "kep": 0.5}, UnknownNameError, "kep"),
        ({"method": "divprune", "keep": 1.5}, BudgetError, "above 1"),
        ({"method": "divprune", "keep": 0}, BudgetError, "keeps no visual token"),
        ({"method": "fastv", "keep": 0.5}, UnsupportedMethodError, "inside the language model"),
        ({"method": "todre", "keep": 0.5}, UnsupportedMethodError, "inside the language model"),
        ({"method": "tome", "keep": 0.5}, UnsupportedMethodError, "blocks of the vision tower"),
        ({"method": "cdpruner", "keep": 0.5}, UnsupportedMethodError, "text beside it"),
        ({"method": "hawk", "keep": 0.5}, UnsupportedMethodError, "first decoder layer"),
        ({"method": "pixelprune", "keep": 0.5}, UnsupportedMethodError, "size of an image"),
        ({"method": "evs", "keep": 0.5}, UnsupportedMethodError, "videos"),
        ({"method": "tokencorr"}, UnsupportedMethodError, "give it a keep"),
        ({"method": "divprune", "keep": 0.5, "keep_positions": True}, UnsupportedMethodError, "keep_positions"),
        ({"method": "hired", "keep": 0.5}, UnsupportedMethodError, "Qwen2.5-VL models"),
    ],
)
def test_refused_settings(setting, error, says):
    with pytest.raises(error, match=says):
        check(setting)


@pytest.mark.parametrize("release", ["0.31.3", "0.33.0", "1.0", None])
def test_untested_versions(release):
    with pytest.raises(UnsupportedCallError, match=r"tested: 0\.32\.x"):
        check({"method": "divprune", "keep": 0.5}, release=release)


def test_other_families():
    with pytest.raises(UnsupportedFamilyError, match="InternVLForConditionalGeneration is not served"):
        check_setting(
            "InternVLForConditionalGeneration", SimpleNamespace(vlmprune={"method": "divprune", "keep": 0.5}), "0.32.0"
        )


def test_pooling_needs_a_grid():
    check({"method": "pool", "keep": 0.5}, LLAVA)
    with pytest.raises(UnsupportedMethodError, match="LLaVA-OneVision models do not give"):
        check({"method": "pool", "keep": 0.5}, "LlavaOnevisionForConditionalGeneration")


def test_other_towers():
    config = config_of(LLAVA, {"method": "divprune", "keep": 0.5})
    config.vision_config.model_type = "pixtral"
    with pytest.raises(UnsupportedFamilyError, match="pixtral"):
        check_setting(LLAVA, config, "0.32.0")


def test_other_interpolation():
    architecture = "LlavaOnevisionForConditionalGeneration"
    config = config_of(architecture, {"method": "divprune", "keep": 0.5})
    config.vision_aspect_ratio = "anyres_max_2"
    with pytest.raises(UnsupportedFamilyError, match="anyres_max_9"):
        check_setting(architecture, config, "0.32.0")


def engine_config(**changes):
    values = {
        "compile_mm_encoder": False,
        "cudagraph_mm_encoder": False,
        "cudagraph_mode": "FULL_AND_PIECEWISE",
        "tensor_parallel_size": 1,
        "pipeline_parallel_size": 1,
        "enable_dbo": False,
        "speculative_config": None,
        "video_pruning_rate": None,
    } | changes
    names = ("compile_mm_encoder", "cudagraph_mm_encoder")
    return SimpleNamespace(
        compilation_config=SimpleNamespace(
            **{name: values[name] for name in names}, cudagraph_mode=SimpleNamespace(name=values["cudagraph_mode"])
        ),
        parallel_config=SimpleNamespace(
            **{name: values[name] for name in ("tensor_parallel_size", "pipeline_parallel_size", "enable_dbo")}
        ),
        model_config=SimpleNamespace(
            multimodal_config=SimpleNamespace(video_pruning_rate=values["video_pruning_rate"])
        ),
        speculative_config=values["speculative_config"],
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"compile_mm_encoder": True},
        {"cudagraph_mm_encoder": True},
        {"cudagraph_mode": "FULL"},
        {"tensor_parallel_size": 2},
        {"pipeline_parallel_size": 2},
        {"enable_dbo": True},
        {"speculative_config": object()},
        {"video_pruning_rate": 0.5},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_refused_engines(changes):
    check_engine(engine_config(), reads_tower=True, mrope=True)
    with pytest.raises(UnsupportedCallError, match=next(iter(changes))):
        check_engine(engine_config(**changes), reads_tower=True, mrope=True)


@pytest.mark.parametrize("changes", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 4}])
def test_served_engines(changes):
    check_engine(engine_config(**changes), reads_tower=False, mrope=False)


def test_every_method_is_served_or_has_a_reason():
    names = set(served())
    assert {"random", "uniform", "pool", "divprune", "fastervlm", "visionzip", "holov"} <= names
    for name in set(known_methods()) - names:
        with pytest.raises((UnsupportedMethodError, BudgetError, ParameterError)):
            check({"method": name, "keep": 0.5})


def test_identity_tells_methods_and_budgets_apart():
    def identity(**setting):
        served_method = read_setting(SimpleNamespace(vlmprune=setting))
        assert isinstance(served_method, ServedMethod)
        return served_method.identity

    settings = [
        {"method": "divprune", "keep": 0.25},
        {"method": "divprune", "keep": 0.5},
        {"method": "divprune", "keep": 0.25, "per": "frame"},
        {"method": "uniform", "keep": 0.25},
        {"method": "random", "keep": 0.25},
        {"method": "random", "keep": 0.25, "seed": 1},
    ]
    assert len({identity(**setting) for setting in settings}) == len(settings)
    assert identity(**settings[0]) == identity(**settings[0])
