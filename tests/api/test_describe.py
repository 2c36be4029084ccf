"""What `describe` tells of a patched model."""

import pytest
import torch

import vlmprune
from support.tiny_models import LLAVA_CLIP_GQA


def test_versions_method_and_hooks_are_told():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    with vlmprune.pruned(model, "fastv", layer=1, keep=0.7):
        told = vlmprune.describe(model).splitlines()
    assert told[0].startswith(f"vlmprune {vlmprune.__version__}, transformers ")
    assert "LlavaForConditionalGeneration as LLaVA" in told[1]
    assert "FastV(keep=0.7, keep_positions=False, layer=1" in told[2]
    hooks = [line.split(maxsplit=2) for line in told[3:]]
    assert ["model.language_model", "before", "language model entry"] in hooks
    assert hooks.index(["model.language_model", "after", "language model exit"]) < hooks.index(
        ["model.language_model.layers.1", "before", "decoder layer 1"]
    )


def test_an_unpatched_model_is_refused():
    with pytest.raises(vlmprune.errors.NotAppliedError, match="No vlmprune method"):
        vlmprune.describe(LLAVA_CLIP_GQA.build(torch.float32))
