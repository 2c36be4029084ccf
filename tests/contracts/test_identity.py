"""Contract 1: keep=1.0 is bit-identical to the unpatched model."""

import pytest
import torch

import vlmprune
from support.matrix import METHOD_PARAMETERS, over_matrix


@over_matrix
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_keep_everything_is_bit_identical(method, family, dtype):
    model = family.build(dtype)
    inputs = family.inputs([[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]], dtype=dtype)
    with torch.no_grad():
        logits = model(**inputs).logits
        tokens = model.generate(**inputs, max_new_tokens=5, do_sample=False)
        with vlmprune.pruned(model, method, keep=1.0, **METHOD_PARAMETERS[method]):
            assert torch.equal(model(**inputs).logits, logits)
            assert torch.equal(model.generate(**inputs, max_new_tokens=5, do_sample=False), tokens)
            run = vlmprune.last_run(model)
    assert [image.kept.tolist() for image in run.images] == [list(range(image.total)) for image in run.images]
