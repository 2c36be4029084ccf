"""Analytic costs against torch's own counter, and the papers' formulas against their published figures."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    CLIPVisionConfig,
    GPT2Config,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    OPTConfig,
    Qwen2Config,
    SiglipVisionConfig,
)

import vlmprune
from vlmprune.errors import UnknownNameError
from vlmprune.eval.flops import (
    LanguageShape,
    VisionWork,
    equivalent_tokens,
    fastv_formula,
    llava_vision_macs,
    pyramiddrop_formula,
    request_cost,
)

LLAMA_7B = LlamaConfig()
TOWER = {
    **{"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2},
    **{"image_size": 32, "patch_size": 8},
}
GQA = {"num_hidden_layers": 2, "hidden_size": 64, "intermediate_size": 80, "num_attention_heads": 8, "vocab_size": 90}


def counted(call) -> int:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops()


def on_meta(config, tokens: int):
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32)
        ids = torch.zeros(1, tokens, dtype=torch.long)
        mask = torch.zeros(1, 1, tokens, tokens)
        positions = torch.zeros(1, tokens, dtype=torch.long)
    return lambda: model(input_ids=ids, attention_mask=mask, position_ids=positions, use_cache=False, logits_to_keep=1)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**GQA),
        LlamaConfig(**GQA, num_key_value_heads=2),
        LlamaConfig(**GQA, head_dim=16),
        Qwen2Config(**GQA, num_key_value_heads=2),
    ],
    ids=["llama", "grouped-query", "wide-heads", "qwen2"],
)
def test_language_model_matches_the_counter(config):
    shape = LanguageShape.from_config(config)
    for tokens in (7, 50):
        assert 2 * (shape.prefill_macs([tokens] * 2) + shape.head_macs()) == counted(on_meta(config, tokens))


@pytest.mark.parametrize(
    "config",
    [
        OPTConfig(
            num_hidden_layers=2,
            hidden_size=64,
            ffn_dim=80,
            num_attention_heads=8,
            vocab_size=90,
            word_embed_proj_dim=64,
        ),
        GPT2Config(n_layer=2, n_embd=64, n_head=8, vocab_size=90),
    ],
    ids=["opt", "gpt2"],
)
def test_models_without_gate_match_the_counter(config):
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    ids = torch.zeros(1, 9, dtype=torch.long)
    shape = LanguageShape.from_config(config)
    assert 2 * (shape.prefill_macs([9] * 2) + shape.head_macs()) == counted(lambda: model(ids, logits_to_keep=1))


def test_llama_7b_matches_the_measured_reference_points():
    shape = LanguageShape.from_config(LLAMA_7B)
    assert 2 * shape.prefill_macs([576] * 32) / 1e12 == pytest.approx(7.634, abs=5e-4)
    assert 2 * shape.prefill_macs([622] * 32) / 1e12 == pytest.approx(8.258, abs=1e-3)


def test_decode_matches_the_counter():
    config = LlamaConfig(**GQA, num_key_value_heads=2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    prompt = torch.zeros(1, 11, dtype=torch.long)

    def generate(tokens: int) -> int:
        return counted(
            lambda: model.generate(
                prompt, min_new_tokens=tokens, max_new_tokens=tokens, do_sample=False, pad_token_id=0
            )
        )

    shape = LanguageShape.from_config(config)
    assert generate(5) - generate(1) == 2 * shape.decode_macs([11] * 2, 4)


@pytest.mark.parametrize(
    ("vision", "feature_layer", "strategy"),
    [
        (CLIPVisionConfig(**TOWER), -2, "default"),
        (CLIPVisionConfig(**TOWER), [-2, -1], "full"),
        (SiglipVisionConfig(**TOWER), -1, "full"),
        (SiglipVisionConfig(**TOWER, vision_use_head=False), -1, "full"),
    ],
    ids=["clip", "clip-two-layers", "siglip", "siglip-without-head"],
)
def test_vision_tower_and_projector_match_the_counter(vision, feature_layer, strategy):
    text = LlamaConfig(num_hidden_layers=1, hidden_size=24, intermediate_size=8, num_attention_heads=2, vocab_size=9)
    config = LlavaConfig(
        vision_config=vision,
        text_config=text,
        vision_feature_layer=feature_layer,
        vision_feature_select_strategy=strategy,
    )
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    pixels = torch.zeros(3, 3, 32, 32)
    total = counted(lambda: model.model.get_image_features(pixels))
    assert 2 * sum(llava_vision_macs(config, VisionWork(crops=3))) == total
    text_only = llava_vision_macs(config, VisionWork())
    assert text_only == (0, 0)


@pytest.mark.parametrize(("method", "keep"), [(None, 1.0), ("uniform", 0.25), ("random", 10), ("pool", 0.5)])
def test_whole_request_matches_the_counter_with_and_without_pruning(toy, method, keep):
    config = toy.config()
    config._attn_implementation = "eager"
    model = LlavaForConditionalGeneration._from_config(config, attn_implementation="eager").eval()
    inputs = toy.processor()(text="USER : <image> what colour ?", images=toy.image(0), return_tensors="pt")
    call = lambda: model(**inputs, logits_to_keep=1)  # noqa: E731
    if method is None:
        total, visual, text = counted(call), [64] * 3, inputs["input_ids"].shape[1] - 64
    else:
        with vlmprune.pruned(model, method, keep=keep):
            total = counted(call)
            run = vlmprune.last_run(model)
        visual, text = run.visual_tokens_per_layer[0], run.text_tokens[0]
        assert visual[0] < 64
    assert 2 * request_cost(config, VisionWork(crops=1), visual, text).total == total


def test_tokens_dropped_inside_the_model_are_counted_layer_by_layer():
    shape = LanguageShape.from_config(LLAMA_7B)
    dropped = shape.prefill_macs([600] * 8 + [300] * 24)
    assert dropped == (shape.prefill_macs([600] * 32) + 3 * shape.prefill_macs([300] * 32)) // 4


def test_published_figures():
    full, dropped = [576] * 32, [576] * 8 + [288] * 8 + [144] * 8 + [72] * 8
    assert round(pyramiddrop_formula(full, 4096, 11008) / 1e12, 2) == 3.82
    assert round(pyramiddrop_formula(dropped, 4096, 11008) / 1e12, 2) == 1.78
    full, dropped = ([5 * n for n in counts] for counts in (full, dropped))
    assert round(pyramiddrop_formula(full, 4096, 11008) / 1e12, 2) == 20.83
    assert round(pyramiddrop_formula(dropped, 4096, 11008) / 1e12, 2) == 9.46
    assert round(fastv_formula([576] * 32, 4096, 11008) / 1e12, 3) == 2.986


def test_equivalent_tokens_of_fastv():
    assert round(equivalent_tokens([576] * 2 + [144] * 30)) == 171


def test_cache_bytes_of_llama_7b():
    assert LanguageShape.from_config(LLAMA_7B).cache_bytes([1] * 32, 2) == 512 * 1024


def test_wrong_number_of_layers_and_unknown_families_are_refused():
    with pytest.raises(ValueError, match="31 token counts given for a language model of 32 layers"):
        LanguageShape.from_config(LLAMA_7B).prefill_macs([1] * 31)
    with pytest.raises(UnknownNameError, match="llama"):
        request_cost(LLAMA_7B, VisionWork(), [1] * 32, 1)
