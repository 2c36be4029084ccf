"""Classes without a family of their own, served by what is found in them."""

from functools import lru_cache

import pytest
import torch

import vlmprune
from support.general.host_case import build
from support.general.shrunk import model_class, shrunk_config
from vlmprune.errors import UnsupportedFamilyError

# Plain, hybrid with M-RoPE, sliding layers, features by row, masks of the host's own where that can be read.
REPRESENTATIVES = [
    name
    for name in (
        "DeepseekVLForConditionalGeneration",
        "Qwen3_5ForConditionalGeneration",
        "AyaVisionForConditionalGeneration",
        "SmolVLMForConditionalGeneration",
    )
    if model_class(name)
]
ROWS = [[3, "A", 4], [5, "B", 6]]
built = lru_cache(build)
over_representatives = pytest.mark.parametrize("name", REPRESENTATIVES)


@over_representatives
def test_everything_kept_changes_nothing(name):
    case = built(name)
    inputs = case.inputs(ROWS)
    with torch.no_grad():
        logits = case.model(**inputs).logits
        with vlmprune.pruned(case.model, "divprune", keep=1.0):
            assert torch.equal(case.model(**inputs).logits, logits)
        with vlmprune.pruned(case.model, "divprune", keep=0.5):
            assert not torch.equal(case.model(**inputs).logits, logits)
        assert torch.equal(case.model(**inputs).logits, logits)


@over_representatives
def test_a_row_in_a_batch_equals_the_row_alone(name):
    case = built(name)
    inputs = case.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(case.model, "divprune", keep=0.5):
        together = case.model(**inputs).logits
        words = case.model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, -5:]
        for row, items in enumerate(ROWS):
            alone = case.inputs([items])
            logits = case.model(**alone).logits[0]
            torch.testing.assert_close(
                together[row, inputs["attention_mask"][row].bool()], logits, atol=1e-4, rtol=1e-3
            )
            assert torch.equal(case.model.generate(**alone, max_new_tokens=5, do_sample=False)[0, -5:], words[row])


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        ("MllamaForConditionalGeneration", "cross attention.*cross_attention_states"),
        ("Blip2ForConditionalGeneration", "Q-Former"),
        ("T5Gemma2ForConditionalGeneration", "encoder-decoder"),
    ],
)
def test_what_does_not_fit_says_which_fact_is_missing(name, fact):
    cls = model_class(name)
    model = cls(shrunk_config(cls))
    with pytest.raises(UnsupportedFamilyError, match=rf"(?s){fact}.*Nearest class that is supported"):
        vlmprune.apply(model, "uniform", keep=0.5)
