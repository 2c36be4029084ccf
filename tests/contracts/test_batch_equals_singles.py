"""Contract 4: a row of a batch gives what it gives alone, whatever its neighbours and the padding side."""

import pytest
import torch

import vlmprune
from support.host_parts import decoder
from support.matrix import METHOD_PARAMETERS, makes_masks, over_matrix

ROWS = [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]]


@over_matrix
@pytest.mark.parametrize("padding", ["left", "right"])
def test_row_in_a_batch_equals_row_alone(method, family, padding):
    model = family.build(torch.float32)
    batch = family.inputs(ROWS, padding)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        together = model(**batch).logits
        run = vlmprune.last_run(model)
        for row, items in enumerate(ROWS):
            single = family.inputs([items])
            alone = model(**single).logits[0]
            valid = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, valid], alone, atol=2e-5, rtol=1e-4)
            expected = [image.kept.tolist() for image in vlmprune.last_run(model).images]
            assert [image.kept.tolist() for image in run.images if image.batch_index == row] == expected


@over_matrix
def test_generation_in_a_batch_equals_generation_alone(method, family):
    model = family.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        together = model.generate(**family.inputs(ROWS), max_new_tokens=6, do_sample=False)[:, -6:]
        for row, items in enumerate(ROWS):
            alone = model.generate(**family.inputs([items]), max_new_tokens=6, do_sample=False)[0, -6:]
            assert together[row].tolist() == alone.tolist()


@over_matrix
def test_interior_rows_without_padding_use_no_mask(method, family):
    model = family.build(torch.float32)
    masks = []
    handle = (
        decoder(model)
        .layers[0]
        .register_forward_pre_hook(
            lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
        )
    )
    try:
        with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
            model.generate(**family.inputs([[3, "A", 4], [2, "B", 5]]), max_new_tokens=3, do_sample=False)
    finally:
        handle.remove()
    # Images that see themselves both ways, and windows, are a mask without any padding too.
    assert makes_masks(family) or masks == [None] * 3
