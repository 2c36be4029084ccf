"""Masks that the caller made ready for the attention (by kind of layer, or 4-D): refused where something is dropped."""

import pytest
import torch
from transformers.masking_utils import create_causal_mask

import vlmprune
from support.deeper import deeper
from support.families.qwen2_5_vl import CASES
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedCallError

METHODS = [("divprune", {}), ("fastv", {"layer": 1}), ("pyramiddrop", {})]


def ready_mask(model, inputs):
    embeddings = model.get_input_embeddings()(inputs["input_ids"])
    config = model.model.language_model.config
    return create_causal_mask(config, embeddings, inputs["attention_mask"], None, allow_is_causal_skip=False)


@pytest.mark.parametrize(("method", "parameters"), METHODS)
@pytest.mark.parametrize(("case", "mapping"), [(CASES[0], True), (CASES[0], False), (LLAVA_CLIP_GQA, False)], ids=str)
def test_masks_made_ready_are_refused_and_left_alone_where_all_stays(case, mapping, method, parameters):
    case = deeper(case)
    model, inputs = case.build(torch.float32), case.inputs([[3, "A", 4], [2, "A", 6]])
    with torch.no_grad():
        mask = ready_mask(model, inputs)
        given = {**inputs, "attention_mask": {"full_attention": mask} if mapping else mask, "use_cache": False}
        given["position_ids"] = case.positions(model, inputs)
        expected = model(**given).logits
        with vlmprune.pruned(model, method, keep=1.0):
            assert torch.equal(model(**given).logits, expected)
        with (
            vlmprune.pruned(model, method, keep=0.6, **parameters),
            pytest.raises(UnsupportedCallError, match=r"attention_mask is a (dict|4-D tensor).*needs a 2-D mask"),
        ):
            model(**given)
