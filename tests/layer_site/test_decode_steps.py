"""What the layers are given in a step of decoding: the host's own work, once, and no mask where nothing is masked."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.methods import DivPrune, PyramidDrop
from vlmprune.patches.layers.site import LayerSite

STAGES = PyramidDrop(layers=(1, 2, 4), ratios=(0.5, 0.25, 0.125))
FAMILIES = pytest.mark.parametrize("family", [deeper(LLAVA_CLIP_GQA), deeper(QWEN2_5_VL)], ids=["llava", "qwen2.5-vl"])


def steps(model, inputs, count=3):
    """Logits of some steps of decoding with ids, mask and positions left to the host."""
    output, logits = model(**inputs, use_cache=True), []
    mask = inputs["attention_mask"]
    for _ in range(count):
        mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
        ids = torch.full((len(mask), 1), 7)
        output = model(input_ids=ids, attention_mask=mask, past_key_values=output.past_key_values)
        logits.append(output.logits)
    return torch.cat(logits, 1)


@FAMILIES
@torch.no_grad()
def test_one_call_for_rotary_embeddings_and_no_masks(family):
    model, inputs = family.build(torch.float32), family.inputs([[3, "A", 5]])
    language = model.model.language_model
    with vlmprune.pruned(model, STAGES, positions="compact"):
        cache = model(**inputs, use_cache=True).past_key_values
        calls, masks = [], []
        handles = [language.rotary_emb.register_forward_hook(lambda *given: calls.append(given))]
        handles += [
            layer.register_forward_pre_hook(
                lambda m, a, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
            )
            for layer in language.layers
        ]
        mask = torch.ones(1, cache.get_seq_length() + 1, dtype=torch.int64)
        model(input_ids=torch.tensor([[7]]), attention_mask=mask, past_key_values=cache)
        for handle in handles:
            handle.remove()
    assert len(calls) == 1
    assert masks == [None] * len(language.layers)


@FAMILIES
@pytest.mark.parametrize("rows", [[[3, "A", 5]], [[3, "A", 5], [6, "A", 2, "A", 2], [4]]], ids=["one", "padded"])
@pytest.mark.parametrize("method", [STAGES, [DivPrune(keep=0.6), STAGES]], ids=["stages", "pipeline"])
@torch.no_grad()
def test_groups_rotated_together_or_alone(family, rows, method, monkeypatch):
    """Models whose frequencies follow the length of a call rotate every group alone; the others give the same that way."""
    model = family.build(torch.float32)
    inputs = family.inputs(rows, "left") if len(rows) > 1 else family.inputs(rows)
    with vlmprune.pruned(model, method, positions="compact"):
        together = steps(model, inputs)
        make = LayerSite.continued_layers

        def alone(site, call, state):
            site.together = False
            return make(site, call, state)

        monkeypatch.setattr(LayerSite, "continued_layers", alone)
        torch.testing.assert_close(steps(model, inputs), together, atol=1e-5, rtol=1e-5)
