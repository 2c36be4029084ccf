"""Cost of selecting: against torch's counter where it is products, and by hand."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForImageTextToText, LlavaForConditionalGeneration

import vlmprune
from support.tiny_configs import MAKERS, tiny_config
from vlmprune.eval.accuracy.request_records import entering_images
from vlmprune.eval.flops import VisionWork, request_cost, selection_macs, vision_cost
from vlmprune.eval.models.random_weights import preset_config
from vlmprune.eval.models.synthetic_request import synthetic_request
from vlmprune.methods.attention_method import AttentionMethod
from vlmprune.methods.encoder_method import BlockShape, EncoderMethod
from vlmprune.methods.layer_method import LayerMethod
from vlmprune.methods.registry import make_method, method_names
from vlmprune.methods.selection_macs import Scored, ScoredLayers

pytest.importorskip("lmms_eval")


def test_every_method_says_what_it_computes():
    for name in method_names():
        for part in make_method(name).parts():
            if isinstance(part, AttentionMethod):
                assert part.change_macs(1, 9, 8, 16) > 0
                continue
            if isinstance(part, EncoderMethod):
                own = part.reduction_macs(BlockShape(tokens=65, outputs=49, dim=8, heads=2, leading=1))
            else:
                inner, entered = ScoredLayers([64] * 8, 5, 8), Scored([(64, 16)], 8, True)
                own = part.own_macs(inner) if isinstance(part, LayerMethod) else part.feature_macs(entered)
            assert own is not None, name


@pytest.mark.parametrize(
    ("method", "parameters"),
    [
        ("uniform", {"keep": 0.25}),
        ("random", {"keep": 10}),
        ("pool", {"keep": 0.5}),
        ("divprune", {"keep": 0.25}),
        ("textmonkey", {"keep": 0.25}),
        ("holov", {"keep": 0.25}),
        ("vispruner", {"keep": 0.25}),
        ("visionzip", {"keep": 0.25}),
        ("scope", {"keep": 0.25}),
        ("tokencorr", {"keep": 0.25}),
        ("zooprune", {"keep": 0.25, "sketch": None}),
        ("zooprune", {"keep": 0.25, "m": 5}),
        ("todre", {"keep": 16, "relevance": False}),
        ("todre", {"keep": 2, "relevance": False}),
        ("tome", {"keep": 0.7}),
        ("tome", {"keep": 0.4, "output": "merged"}),
        ("expedite", {"keep": 0.7}),
        ("expedite", {"clusters": (5, 5), "layer": 1, "tau": 0.01, "output": "merged"}),
        ("pitome", {"keep": 0.7}),
        ("pitome", {"keep": 0.4, "output": "merged", "schedule": "deit", "metric": "keys"}),
        ("crossget", {"keep": 0.4, "output": "merged", "variant": "matching"}),
        ("mctf", {"r": 5, "layers": (1,)}),
        ("mctf", {"r": 5, "layers": (1,), "mode": "precise"}),
        ("zero_tprune", {"keep": 0.7, "redundant": 4}),
        ("token_transforming", {"keep": 0.7, "layers": (1,)}),
        ("fastv", {"layer": 1, "ratio": 0.75}),
        ("pyramiddrop", {"layers": (1, 2), "ratios": (0.5, 0.25)}),
    ],
    ids=str,
)
def test_a_pruned_request_matches_the_counter(toy, method, parameters):
    config = toy.config()
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    inputs = toy.processor()(text="USER : <image> what colour ?", images=toy.image(0), return_tensors="pt")
    with vlmprune.pruned(model, method, **parameters):
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(**inputs, logits_to_keep=1)
        run = vlmprune.last_run(model)
    made = make_method(method, **parameters)
    visual, text = run.visual_tokens_per_layer[0], run.text_tokens[0]
    (images,) = entering_images(run, 1)
    cost = request_cost(config, VisionWork(crops=1), visual, text, method=made, images=images)
    assert min(visual) < 64 or isinstance(made, EncoderMethod)
    # Products of a matrix with single rows are left out by torch.
    uncounted = 2 * 64 * config.text_config.hidden_size if method == "todre" and parameters["keep"] == 2 else 0
    assert counter.get_total_flops() == 2 * (cost.total - uncounted)


@pytest.mark.parametrize("model_type", MAKERS)
def test_pruned_requests_of_every_family_match_the_counter(model_type):
    config = tiny_config(model_type)
    config._experts_implementation = "eager"
    model = AutoModelForImageTextToText.from_config(config, attn_implementation="eager").eval()
    inputs = synthetic_request(config, (50, 40), 10, batch_size=2)
    works = vision_cost(config).work(config, inputs, [1, 1])
    names = {"uniform", "tome", "fastervlm", "vtc_cls", "hired", "divprune", "pyramiddrop"} & set(
        vlmprune.list_methods(model)
    )
    if hasattr(config.vision_config, "window_size"):
        # What its windows lose depends on the picture.
        names.discard("tome")
    assert len(names) >= 5
    for name in names:
        method = make_method(name, keep=0.7 if name == "tome" else 0.5)
        with vlmprune.pruned(model, method):
            with FlopCounterMode(display=False) as counter, torch.no_grad():
                model(**inputs, logits_to_keep=1)
            run = vlmprune.last_run(model)
        images = entering_images(run, 2)
        costs = [
            request_cost(
                config, works[row], run.visual_tokens_per_layer[row], run.text_tokens[row], 0, method, images[row]
            )
            for row in range(2)
        ]
        assert counter.get_total_flops() == 2 * sum(cost.total for cost in costs), name
        assert (costs[0].selection > 0) == (name != "uniform")


def test_costs_by_hand():
    config, work = preset_config("llava-1.5-7b"), VisionWork(crops=1)

    def cost(name, kept, **parameters):
        return selection_macs(config, make_method(name, **parameters), work, [(576, kept)], [kept] * 32, 40)

    assert cost("fastervlm", 144) == 577 * 1024
    assert cost("vtc_cls", 144) == 7 * 577 * 1024
    assert cost("divprune", 144) == 576 * 576 * 4096
    assert cost("divprune", 576) == 0
    assert cost("random", 144) == 0
    assert cost("globalcom2", 144) == 577 * 1024
    # Queries of the text, keys of the tokens, one product for each token.
    assert cost("hawk", 144) == 40 * 4096 * 4096 + 576 * 4096 * 4096 + 576 * 4096
    qwen = preset_config("qwen2.5-vl-7b")
    grid = VisionWork(grids=((1, 24, 24),))
    method = make_method("fastervlm", keep=36)
    assert selection_macs(qwen, method, grid, [(144, 36)], [36] * 28, 40) == 576 * 576 * 1280


def test_layer_methods_pay_for_one_row_and_for_keys_that_are_dropped():
    config = preset_config("llava-1.5-7b")
    fastv = make_method("fastv", layer=2, ratio=0.5)
    assert selection_macs(config, fastv, VisionWork(crops=1), [(576, 576)], [576] * 2 + [288] * 30, 40) == 616 * 4096
    dropping = make_method("pyramiddrop", layers=(8,), ratios=(0.5,))
    expected = 616 * 4096 + 4096 * 4096 + 288 * 4096 * 4096
    assert selection_macs(config, dropping, VisionWork(crops=1), [], [576] * 8 + [288] * 24, 40) == expected


def test_changing_attention_costs_in_prefill_and_in_every_step():
    config = preset_config("llava-1.5-7b")
    var = make_method("var")
    tokens, width = 616, 4096
    cost = request_cost(config, VisionWork(crops=1), [576] * 32, 40, 3, var, [(576, 576)])
    plain = request_cost(config, VisionWork(crops=1), [576] * 32, 40, 3)
    assert cost.selection == 30 * 40 * (tokens + 576) * width
    assert cost.decode - plain.decode == 30 * (2 * (tokens + 576) + 3) * width
    assert (cost.prefill, plain.selection) == (plain.prefill, 0)


def test_rows_of_beams_are_counted_once(toy):
    model = toy.model()
    inputs = toy.processor()(text="USER : <image> what colour ?", images=toy.image(0), return_tensors="pt")
    with vlmprune.pruned(model, "uniform", keep=8):
        model.generate(**inputs, num_beams=2, max_new_tokens=2, do_sample=False)
        run = vlmprune.last_run(model)
    assert entering_images(run, 1, len(run.text_tokens)) == [((64, 8),)]
