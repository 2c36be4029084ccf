"""Staged dropping with 3-D positions and with features that the host adds in deeper layers, by hand."""

import pytest
import torch
from layer_site.by_hand import cache_lengths

import vlmprune
from support.deeper import deeper
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen3_vl import QWEN3_VL
from support.layerwise import Positions, check_greedy, language_model_inputs, row_by_layers
from vlmprune.methods import DivPrune, FastV, PyramidDrop, ToDRE

EARLY = PyramidDrop(layers=(1, 2, 4), ratios=(0.5, 0.25, 0.125))
BOTH_GAPS, LAYER_GAPS, NO_GAPS = Positions(False, False), Positions(True, False), Positions(True, True)
METHODS = {
    "early": (EARLY, None, BOTH_GAPS),
    "late": (PyramidDrop(layers=(3, 5), ratios=(0.5, 0.25)), None, BOTH_GAPS),
    "compact": (PyramidDrop(layers=(2, 4), ratios=(0.5, 0.25)), "compact", NO_GAPS),
    "fastv": (FastV(layer=2, ratio=0.6), None, BOTH_GAPS),
    "fastv-compact": (FastV(layer=2, ratio=0.6), "compact", NO_GAPS),
    "pipeline": ([DivPrune(keep=0.6), EARLY], None, BOTH_GAPS),
    "pipeline-compact": ([DivPrune(keep=0.6), EARLY], "compact", NO_GAPS),
    "todre": (ToDRE(keep=0.4, tau=1.0, layer=2), None, BOTH_GAPS),
}
ROWS = [[3, "A", 5], [6, "small", 2, "large", 2], [4]]


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("family", [deeper(QWEN2_5_VL), deeper(QWEN3_VL)], ids=["qwen2.5-vl", "qwen3-vl"])
@pytest.mark.parametrize("padding", ["left", "right"])
@torch.no_grad()
def test_prefill_decode_and_second_turn(family, name, padding):
    method, asked, positions = METHODS[name]
    model, inputs = family.build(torch.float32), family.inputs(ROWS, padding)
    total = inputs["input_ids"].shape[1]
    with vlmprune.pruned(model, method, positions=asked):
        output = model(**inputs)
        run = vlmprune.last_run(model)
        if padding == "left":
            greedy = {"max_new_tokens": 4, "do_sample": False, "return_dict_in_generate": True}
            turn = model.generate(**inputs, **greedy)
            lengths = cache_lengths(turn.past_key_values)
            question = torch.tensor([[21, 22, 23]]).expand(len(ROWS), -1)
            ids = torch.cat([turn.sequences, question], 1)
            mask = torch.cat([inputs["attention_mask"], torch.ones(len(ROWS), 7, dtype=torch.int64)], 1)
            second = model.generate(
                input_ids=ids, attention_mask=mask, past_key_values=turn.past_key_values, **greedy
            ).sequences
    given = language_model_inputs(model, inputs)
    for row in range(len(ROWS)):
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        torch.testing.assert_close(output.logits[row, by_hand.columns], by_hand.logits, atol=5e-4, rtol=5e-4)
        if padding == "left":
            check_greedy(model, inputs, run, row, positions, turn.sequences[row, total:], given)
            check_greedy(model, inputs, run, row, positions, second[row, total:], given, first=7)
    if padding == "left":
        longest = [
            max(text + visual for text, visual in zip(run.text_tokens, layer, strict=True))
            for layer in zip(*run.visual_tokens_per_layer, strict=True)
        ]
        assert lengths[-1] == longest[-1] + 3
        assert longest[-1] < longest[0] <= total
