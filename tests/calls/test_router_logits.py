"""`output_router_logits=True`: full columns outside, and a balancing loss that counts the tokens that were routed."""

import pytest
import torch
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import load_balancing_loss_func

import vlmprune
from support.deeper import deeper
from support.families.qwen3_vl import QWEN3_VL_MOE
from support.layerwise import alive_columns
from vlmprune.errors import UnsupportedCallError

CASE = deeper(QWEN3_VL_MOE)
ROWS = {"padded": [[3, "A", 4], [2, "B", 1, "small", 6], [9]], "even": [[3, "A", 4], [5, "B", 2]]}
METHODS = [("divprune", {}), ("fastv", {"layer": 1}), ("pyramiddrop", {})]


@pytest.mark.parametrize("masked", [True, False])
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize(("method", "parameters"), METHODS)
def test_the_loss_counts_the_tokens_that_each_layer_routed(method, parameters, rows, masked):
    model, inputs = CASE.build(torch.float32), CASE.inputs(rows)
    arguments = dict(inputs) if masked else {key: value for key, value in inputs.items() if key != "attention_mask"}
    if not masked:
        inputs["attention_mask"] = torch.ones_like(inputs["attention_mask"])
    labels, columns = inputs["input_ids"], inputs["input_ids"].shape[1]
    with vlmprune.pruned(model, method, keep=0.6, **parameters):
        output = model(**arguments, labels=labels, output_router_logits=True)
        run = vlmprune.last_run(model)
        plain = model(**arguments, labels=labels)
    caught = []
    for layer, logits in enumerate(output.router_logits):
        assert logits.shape == (len(rows) * columns, 4)
        alive = [alive_columns(model, inputs, run, row, layer) + row * columns for row in range(len(rows))]
        alive = torch.cat(alive)
        dropped = inputs["attention_mask"].bool().flatten()
        dropped[alive] = False
        assert not logits[dropped].any()
        caught.append(logits[alive])
    expected = load_balancing_loss_func(tuple(caught), 4, 2, None)
    torch.testing.assert_close(output.aux_loss, expected)
    coefficient = model.config.text_config.router_aux_loss_coef
    torch.testing.assert_close(output.loss, plain.loss + coefficient * expected)
    gate = model.model.language_model.layers[0].mlp.gate.weight
    (gradient,) = torch.autograd.grad(output.loss - plain.loss, gate, retain_graph=True)
    (wanted,) = torch.autograd.grad(coefficient * expected, gate)
    torch.testing.assert_close(gradient, wanted, atol=1e-6, rtol=1e-3)


def test_alone_and_whole_and_as_a_tuple():
    model, inputs = CASE.build(torch.float32), CASE.inputs(ROWS["padded"])
    with torch.no_grad():
        unpruned = model(**inputs, output_router_logits=True)
        with vlmprune.pruned(model, "divprune", keep=1.0):
            whole = model(**inputs, output_router_logits=True)
            assert torch.equal(whole.aux_loss, unpruned.aux_loss)
        with (
            vlmprune.pruned(model, "divprune", keep=0.5),
            pytest.raises(UnsupportedCallError, match="leave return_dict unset"),
        ):
            model(**inputs, output_router_logits=True, return_dict=False)
