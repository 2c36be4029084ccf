"""Pruned calls give under every attention backend what the layers by hand give: ragged rows, cuts inside, gaps in positions."""

import pytest
import torch
from transformers.integrations.flash_attention import flash_attention_forward

import vlmprune
from support.backends import BACKENDS
from support.deeper import deeper
from support.family_cases import FAMILY_CASES
from support.flash_on_cpu import attend, flash_on_cpu
from support.host_parts import decoder
from support.layerwise import Positions, check_greedy, default_positions, row_by_layers
from support.matrix import LAYER_METHODS, METHOD_PARAMETERS, makes_masks, serves
from support.tiny_models import LLAVA_CLIP_GQA

ROWS = {"single": [[3, "A", 4]], "padded": [[3, "A", 4], [2, "B", 1, "C", 6], [9]]}
GREEDY = {"max_new_tokens": 4, "do_sample": False}
# Attention of the tower, attention between layers, both sites.
METHODS = ("fastervlm", "fastv", "todre")
# The stand-in for FlashAttention knows no windows. FlashAttention alone looks at positions; eager has the whole matrix in
# `test_generate`. The host has no FlexAttention for Qwen's language models, and with it takes seconds a call on a CPU.
CASES = [("eager", "fastv", None, family, "padded") for family in FAMILY_CASES if serves("fastv", family)]
CASES += [("flex_attention", method, None, LLAVA_CLIP_GQA, "padded") for method in ("fastervlm", "fastv")]
CASES += [
    ("flash_attention_2", method, positions, family, rows)
    for method in METHODS
    for positions in ("compact", "original")
    for family in FAMILY_CASES
    if serves(method, family) and not makes_masks(family)
    for rows in ROWS
]


def case_of(family, method):
    return deeper(family) if method in LAYER_METHODS else family


@pytest.fixture(autouse=True)
def without_gradients():
    with torch.no_grad():
        yield


@pytest.mark.parametrize(
    ("backend", "method", "positions", "family", "rows"), CASES, ids=["-".join(map(str, case)) for case in CASES]
)
def test_every_backend_gives_what_the_layers_by_hand_give(backend, family, method, positions, rows):
    case = case_of(family, method)
    model, inputs = case.build(torch.float32), case.inputs(ROWS[rows])
    with vlmprune.pruned(model, method, keep=0.3, positions=positions, **METHOD_PARAMETERS[method]):
        model(**inputs)
        expected = [image.kept.tolist() for image in vlmprune.last_run(model).images]
        with BACKENDS[backend](model):
            logits = model(**inputs).logits
            run = vlmprune.last_run(model)
            tokens = model.generate(**inputs, **GREEDY)[:, -4:]
    assert [image.kept.tolist() for image in run.images] == expected
    closing = default_positions(model, method)
    if positions is not None:
        closing = Positions(positions == "compact", positions == "compact")
    for row in range(len(logits)):
        by_hand = row_by_layers(model, inputs, run, row, closing)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-4, rtol=1e-3)
        check_greedy(model, inputs, run, row, closing, tokens[row])


@pytest.mark.parametrize("positions", ["compact", "original"])
@pytest.mark.parametrize(
    ("family", "method"),
    [
        (family, method)
        for family in FAMILY_CASES
        for method in METHODS[:2]
        if serves(method, family) and not makes_masks(family)
    ],
)
def test_flash_attention_over_two_turns_with_images(family, method, positions):
    case = case_of(family, method)
    model = case.build(torch.float32)

    def converse():
        first, second = case.inputs([[3, "A", 4]]), case.inputs([[2, "C", 5]])
        answer = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([answer.sequences, second["input_ids"]], 1)
        inputs = case.longer(model, [first, second], ids, torch.ones_like(ids))
        return model.generate(**inputs, past_key_values=answer.past_key_values, **GREEDY)

    with vlmprune.pruned(model, method, keep=0.3, positions=positions, **METHOD_PARAMETERS[method]):
        expected = converse()
        with flash_on_cpu(model):
            assert torch.equal(converse(), expected)


def test_the_stand_in_equals_sdpa_and_refuses_what_flash_attention_cannot_do():
    model, inputs = LLAVA_CLIP_GQA.build(torch.float32), LLAVA_CLIP_GQA.inputs(ROWS["padded"])
    valid = inputs["attention_mask"].bool()
    expected = model(**inputs).logits
    with flash_on_cpu(model):
        torch.testing.assert_close(model(**inputs).logits[valid], expected[valid], atol=1e-4, rtol=1e-4)
        with pytest.raises(TypeError, match="no mask but a 2-D one"):
            model(**{**inputs, "attention_mask": torch.zeros(3, 1, 86, 86)[..., :1, :]})
        module = decoder(model).layers[0].self_attn
        query, key = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
        given = {"module": module, "query": query, "key": key, "value": key, "attention_mask": None}
        with pytest.raises(ValueError, match="have gaps"):
            attend(**given, position_ids=torch.tensor([[0, 1, 4, 5, 6]]))
        packed = attend(**given, position_ids=torch.tensor([[0, 1, 0, 1, 2]]))[0]
        first = attend(**{**given, **{name: given[name][:, :, :2] for name in ("query", "key", "value")}})[0]
        torch.testing.assert_close(packed[:, :2], first)
        assert attend is not flash_attention_forward
