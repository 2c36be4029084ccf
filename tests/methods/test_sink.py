"""Sinks as a score: what leaves, against the plain sink test on the unpatched model's hidden states."""

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families import qwen2_5_vl
from support.layerwise import language_model_inputs, placeholders
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import BudgetError, ParameterError
from vlmprune.methods import Sink
from vlmprune.methods.shared.attention_sinks import sink_threshold

FAMILIES = [deeper(LLAVA_CLIP_GQA), deeper(qwen2_5_vl.CASES[0])]
ROWS = {"single": [[3, "A", 4]], "three rows": [[3, "A", 4], [2, "B", 2, "small", 6], [9, "large"]]}


@torch.no_grad()
def plain_spikes(model, inputs, layer, tau, dimensions=None):
    """The spike of every token of one row that enters `layer`, in plain loops."""
    seen = []
    handle = model.model.language_model.layers[layer].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
    )
    try:
        language_model_inputs(model, inputs)
    finally:
        handle.remove()
    spikes = []
    for state in seen[0][0].double():
        rms = float((sum(float(value) ** 2 for value in state) / len(state) + 1e-6) ** 0.5)
        spikes.append([abs(float(value)) / rms for value in state])
    if dimensions is None:
        dimensions = [channel for channel, spike in enumerate(spikes[0]) if spike > tau] or range(len(spikes[0]))
    return [max(spike[channel] for channel in dimensions) for spike in spikes]


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("parameters", [{"keep": 0.6}, {"tau": 2.2}, {"tau": 1.5, "dimensions": (3, 7)}], ids=str)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_kept_tokens_are_those_of_the_plain_test(family, parameters, rows):
    model, inputs = family.build(torch.float32), family.inputs(rows)
    with torch.no_grad(), vlmprune.pruned(model, "sink", **parameters):
        model(**inputs)
        records = vlmprune.last_run(model).images
    tau, dimensions = (
        parameters.get("tau", 20 * (model.config.get_text_config().hidden_size / 4096) ** 0.5),
        parameters.get("dimensions"),
    )
    for row, own in enumerate(rows):
        alone = family.inputs([own])
        spikes = plain_spikes(model, alone, 2, tau, dimensions)
        columns = placeholders(model, alone["input_ids"])[0].nonzero().flatten().tolist()
        for record in (record for record in records if record.batch_index == row):
            image, columns = [spikes[column] for column in columns[: record.total]], columns[record.total :]
            if "tau" in parameters:
                expected = [token for token, spike in enumerate(image) if spike <= tau]
                expected = expected or [image.index(min(image))]
            else:
                # 0.6 * 6 layers = 2 + 4 * share
                count = max(1, round(record.total * 0.4))
                expected = sorted(sorted(range(len(image)), key=lambda token, image=image: image[token])[:count])
            assert record.kept.tolist() == expected


def test_counts_and_refusals():
    assert Sink(keep=0.25).schedule(576, 32) == ((2, 115),)
    assert Sink(keep=0.25).schedule(2880, 32) == ((2, 576),)
    assert Sink(tau=20.0).schedule(576, 32) == ((2, None),)
    with pytest.raises(ParameterError, match="both set the budget"):
        Sink(keep=0.5, tau=20.0)
    # Layer 2 of 6 leaves an average of a third at least.
    assert Sink(keep=0.34).cut_layers(6) == (2,)
    assert Sink(keep=0.25).cut_layers(6) == (1,)
    assert Sink(keep=40).cut_layers(6) == (1, 2)
    assert [Sink(keep=40).schedule(total, 6)[0].layer for total in (100, 200)] == [2, 1]
    with pytest.raises(BudgetError, match=r"keep=0\.25.*nearest"):
        Sink(keep=0.25, layer=2).cut_layers(6)


def test_threshold_falls_with_the_width():
    assert [sink_threshold(None, width) for width in (4096, 5120, 1024)] == [20.0, 20.0, 10.0]
    assert sink_threshold(20.0, 128) == 20.0


def test_refusals():
    with pytest.raises(ParameterError, match="dimensions="):
        Sink(dimensions=("a",))
