"""Caches of earlier layers that hold only what is left at the end of a prefill."""

from dataclasses import dataclass

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA, cache_lengths
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import DynamicSlidingWindowLayer

import vlmprune
from support.deeper import deeper
from support.families import qwen2_5_vl
from support.layerwise import Positions, check_greedy, row_by_layers
from support.oracle import suppressed
from vlmprune.errors import UnsupportedCallError
from vlmprune.methods import PyramidDrop
from vlmprune.patches.cache.trim import check_can_trim

ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9], [5, "D", 2]]
GREEDY = {"max_new_tokens": 5, "do_sample": False, "return_dict_in_generate": True}


@dataclass(frozen=True, kw_only=True)
class Trimming(PyramidDrop):
    """PyramidDrop that leaves only the last tokens behind, from layer `first` on."""

    first: int = 1
    name = "trimming"
    positions = "original"

    def trims_cache(self, layers):
        return self.first


def method(first, layers=(2, 4)):
    return Trimming(layers=layers, ratios=(0.5, 0.25), first=first)


@pytest.mark.parametrize("positions", ["original", "compact"])
@pytest.mark.parametrize("first", [0, 1, 2, 3])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS], ids=["single", "padded"])
def test_decoding_and_a_second_turn(rows, first, positions):
    family, model = DEEP_LLAVA, DEEP_LLAVA.build(torch.float32)
    inputs, question = family.inputs(rows), torch.tensor([[21, 22, 23]]).expand(len(rows), -1)
    with torch.no_grad(), vlmprune.pruned(model, method(first), positions=positions):
        turn = model.generate(**inputs, **GREEDY)
        run, held = vlmprune.last_run(model), cache_lengths(turn.past_key_values)
        ids = torch.cat([turn.sequences, question], 1)
        mask = torch.cat([inputs["attention_mask"], torch.ones(len(rows), 8, dtype=torch.long)], 1)
        second = model.generate(input_ids=ids, attention_mask=mask, past_key_values=turn.past_key_values, **GREEDY)
    assert held[first:] == held[-1:] * (8 - first)
    if len(rows) == 1:
        assert held[:first] == [3 + 4 + 36 + 4] * min(first, 2) + [3 + 4 + 18 + 4] * max(0, first - 2)
    compact = positions == "compact"
    by_hand = Positions(compact, compact, first)
    for row in range(len(rows)):
        check_greedy(model, inputs, run, row, by_hand, turn.sequences[row, -5:])
        later = second.sequences[row, inputs["input_ids"].shape[1] :]
        logits = row_by_layers(model, inputs, run, row, by_hand, later[:-1]).logits[-5:]
        assert suppressed(logits).argmax(-1).tolist() == later[-5:].tolist()


def test_the_caches_of_rows_and_of_beams():
    family, model = deeper(qwen2_5_vl.CASES[0]), deeper(qwen2_5_vl.CASES[0]).build(torch.float32)
    inputs = family.inputs([[3, "A", 4], [2, "B", 1]])
    with torch.no_grad(), vlmprune.pruned(model, method(1, (1, 2))):
        turn = model.generate(**inputs, **GREEDY)
        run = vlmprune.last_run(model)
        model.generate(**inputs, max_new_tokens=4, num_beams=2, do_sample=False)
    for row in range(2):
        check_greedy(model, inputs, run, row, Positions(False, False, 1), turn.sequences[row, -5:])


def test_a_static_cache_and_one_that_cannot_be_trimmed():
    family, model = DEEP_LLAVA, DEEP_LLAVA.build(torch.float32)
    inputs = family.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, method(1)):
        dynamic = model.generate(**inputs, **GREEDY).sequences
        config = model.config.get_text_config()
        static = StaticCache(config=config, max_cache_len=120)
        assert torch.equal(model.generate(**inputs, past_key_values=static, **GREEDY).sequences, dynamic)
    cache = DynamicCache()
    check_can_trim(cache, "trimming")
    cache.layers.append(DynamicSlidingWindowLayer(sliding_window=8))
    with pytest.raises(
        UnsupportedCallError, match=r"'trimming' cuts the caches.*a DynamicSlidingWindowLayer does not allow"
    ):
        check_can_trim(cache, "trimming")
