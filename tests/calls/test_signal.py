"""`last_run(model).signal` names the attention that a prefill was scored by, and nothing that was not read."""

import torch

import vlmprune
from support.deeper import deeper
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.methods import FasterVLM, PyramidDrop

CASE = deeper(LLAVA_CLIP_GQA)


@torch.no_grad()
def signal(model, rows):
    model(**CASE.inputs(rows))
    return vlmprune.last_run(model).signal


def test_only_layers_that_were_read_are_named():
    model = CASE.build(torch.float32)
    pyramid = PyramidDrop(layers=(1, 3, 4), ratios=(1.0, 0.5, 0.5))
    with vlmprune.pruned(model, pyramid):
        assert signal(model, [[3, "A", 4]]) == "last token attention layer 3"
        assert signal(model, [[3]]) is None
    with vlmprune.pruned(model, "pyramiddrop", keep=36):
        assert signal(model, [[3, "A", 4]]) is None
    with vlmprune.pruned(model, "todre", keep=0.5, tau=0.0, layer=3):
        assert signal(model, [[3, "A", 4]]) == "cls_attention layer 2, text attention layer 2"
    with vlmprune.pruned(model, "fastervlm", keep=1.0):
        assert signal(model, [[3, "A", 4]]) is None
        with vlmprune.options(model, keep=0.5):
            assert signal(model, [[3, "A", 4]]) == "cls_attention layer 1"
    with vlmprune.pruned(model, [FasterVLM(keep=36), PyramidDrop(layers=(2,), ratios=(0.5,))]):
        assert signal(model, [[3, "A", 4]]) == "last token attention layer 2"
