"""A cache pruned between layers goes on only under a method that watches those layers, with and without a new image."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedCallError

CASE = deeper(LLAVA_CLIP_GQA)
CONTINUATIONS = {"input method": ("uniform", 0.4), "keeps everything": ("pyramiddrop", 1.0)}


@pytest.mark.parametrize("name", CONTINUATIONS)
@pytest.mark.parametrize("turn", [[2], [2, "B", 3]], ids=["text", "image"])
def test_cache_pruned_between_layers_is_refused(name, turn):
    model = CASE.build(torch.float32)
    first, second = CASE.inputs([[3, "A", 4]]), CASE.inputs([turn])
    method, keep = CONTINUATIONS[name]
    with torch.no_grad():
        with vlmprune.pruned(model, "pyramiddrop", keep=0.3):
            cache = model(**first, use_cache=True).past_key_values
        held = [layer.get_seq_length() for layer in cache.layers]
        second["attention_mask"] = torch.ones(1, first["input_ids"].shape[1] + second["input_ids"].shape[1]).long()
        with (
            vlmprune.pruned(model, method, keep=keep),
            pytest.raises(UnsupportedCallError, match="continue it with the method"),
        ):
            model(**second, past_key_values=cache)
    assert [layer.get_seq_length() for layer in cache.layers] == held
