"""Families without a trained checkpoint, as tiny random models whose weights are spread; and every method on all of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

import vlmprune
from support.served import Prompt, Reference, engine, scene_prompts
from support.served_random import RANDOM_MODELS, write_random_model
from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods.registry import make_method
from vlmprune.patches.vllm.image_pruner import ImagePruner
from vlmprune.patches.vllm.refusals import check_family, check_method, served


@pytest.fixture(scope="module", params=RANDOM_MODELS)
def folder(request, tmp_path_factory):
    return write_random_model(request.param, tmp_path_factory.mktemp("models") / request.param)


def prompts_of():
    *one, first, second = [
        replace(prompt, question="what is shown here ?") for prompt in scene_prompts(5, tall=(0, 240, 336))
    ]
    return [*one, Prompt("describe the picture ."), Prompt("and ?", (*first.pictures, *second.pictures))]


@torch.no_grad()
def test_same_answers_and_every_method_keeps_the_same(folder):
    host = Reference(folder)
    prompts = prompts_of()
    if folder.name == "llava-onevision":
        # transformers cuts pictures in crops only where they are alone in their prompt, vLLM always.
        prompts = prompts[:-1]
    setting = {"method": "divprune", "keep": 0.3}
    with engine(folder, setting) as served_engine:
        wanted = host.answers(prompts, **setting)
        answers = served_engine.answers(prompts, host.processor, one_by_one=True)
        assert answers.kept == wanted.kept
        assert answers.tokens == wanted.tokens
        checked, refused = check_methods(host, served_engine, prompts[:3])
    assert {"random", "uniform", "divprune", "fastervlm", "vtc_cls"} <= checked
    assert checked | refused == set(served())
    assert ("pool" in checked) == (folder.name != "llava-onevision")


def check_methods(host, served_engine, prompts):
    """Compare what every method keeps of the same pictures; returns the methods, and those that the model is refused for."""
    checked, refused = set(), set()
    model, encoded = served_engine.model, served_engine.image_inputs[: len(prompts)]
    given = [
        host.processor(text=[prompt.text(host.processor)], images=list(prompt.pictures), return_tensors="pt")
        for prompt in prompts
    ]
    for name in served():
        method = check_method(make_method(name, keep=0.3))
        try:
            check_family(method, model.pruner.family)
            model.pruner = ImagePruner(model, type(model.pruner.family), method, model.pruner.width)
        except UnsupportedMethodError:
            refused.add(name)
            continue
        with vlmprune.pruned(host.model, method):
            for inputs, image_input in zip(given, encoded, strict=True):
                host.model(**inputs)
                (wanted,) = vlmprune.last_run(host.model).images
                type(model)._process_image_input(model, image_input)
                (image,) = model.pruner.last
                kept, other = set(image.kept.tolist()), set(wanted.kept.tolist())
                # The towers round differently, which decides between scores that are equal but for that.
                assert len(kept) == len(other), name
                assert len(kept - other) <= len(other) // 40, name
        model.pruner.hooks.remove()
        checked.add(name)
    return checked, refused
