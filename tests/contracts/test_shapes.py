"""Contract 5: the caller's shapes do not change; labels, losses and slicing by prompt length go on working."""

import torch

import vlmprune
from support.matrix import METHOD_PARAMETERS, over_matrix
from support.oracle import kept_columns

ROWS = [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]]


@over_matrix
def test_outputs_keep_the_length_of_the_prompt(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    batch, columns = inputs["input_ids"].shape
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        output = model(**inputs, output_hidden_states=True)
        hidden = model.model(**inputs).last_hidden_state
        run = vlmprune.last_run(model)
    assert output.logits.shape[:2] == (batch, columns)
    assert [state.shape[:2] for state in output.hidden_states] == [(batch, columns)] * len(output.hidden_states)
    torch.testing.assert_close(output.hidden_states[-1], hidden)
    for row in range(batch):
        dropped = torch.ones(columns, dtype=torch.bool)
        dropped[kept_columns(inputs, run, row)] = False
        assert torch.count_nonzero(hidden[row, dropped]) == 0
        assert hidden[row, ~dropped].abs().sum(-1).min() > 0


@over_matrix
def test_labels_and_logits_to_keep(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    labels = torch.full_like(inputs["input_ids"], -100)
    labels[:, -3:] = inputs["input_ids"][:, -3:]
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        output = model(**inputs, labels=labels)
        last = model(**inputs, logits_to_keep=2).logits
        positions = model(**inputs, logits_to_keep=torch.tensor([1, 5])).logits
    expected = torch.nn.functional.cross_entropy(output.logits[:, -4:-1].flatten(0, 1), labels[:, -3:].flatten())
    torch.testing.assert_close(output.loss, expected)
    torch.testing.assert_close(last, output.logits[:, -2:])
    torch.testing.assert_close(positions, output.logits[:, [1, 5]])


@over_matrix
def test_gradients_flow_through_a_pruned_forward(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    with vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        loss = model(**inputs, labels=inputs["input_ids"]).loss
        gradient = torch.autograd.grad(loss, model.get_input_embeddings().weight)[0]
    assert gradient.isfinite().all()
    assert gradient.abs().sum() > 0
