"""Analytic costs against torch's own counter, and the papers' formulas against their published figures."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    OPTConfig,
    Qwen2Config,
)

from vlmprune.eval.flops import (
    LanguageShape,
    equivalent_tokens,
    fastv_formula,
    pyramiddrop_formula,
)

LLAMA_7B = LlamaConfig()
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


def test_a_wrong_number_of_layers_is_refused():
    with pytest.raises(ValueError, match="31 token counts given for a language model of 32 layers"):
        LanguageShape.from_config(LLAMA_7B).prefill_macs([1] * 31)
