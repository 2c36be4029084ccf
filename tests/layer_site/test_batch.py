"""What a layer method is shown is what the host computes, whatever the padding, the neighbours and the cuts before."""

from dataclasses import dataclass, field

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA, row_by_hand

import vlmprune
from support.oracle import merged_embeddings
from support.tiny_models import IMAGE_TOKEN
from vlmprune.methods import LayerMethod
from vlmprune.methods.batch import Selection
from vlmprune.methods.layer_method import LayerCut, LayerSignal
from vlmprune.methods.needs import (
    HIDDEN_AT_CUT,
    TEXT_AT_CUT,
    TEXT_BEFORE_CUT,
    VALUES_BEFORE_CUT,
    VISUAL_AT_CUT,
)

ROWS = [[3, "A", 4, 5], [2, "B", 1, "C", 6, 7], [9], [5, "D", 2]]
SIGNALS = (LayerSignal("last_token_attention", 0), LayerSignal("attention", 1), LayerSignal("mlp", 1))


@dataclass(frozen=True, kw_only=True)
class Noting(LayerMethod):
    """Keeps every other token at layers 2 and 4, and what it is shown."""

    need: object = TEXT_BEFORE_CUT
    batches: list = field(default_factory=list)
    name = "noting"
    positions = "original"

    @property
    def reading(self):
        return self.need

    def cut_layers(self, layers):
        return (2, 4)

    def schedule(self, total, layers):
        return (LayerCut(2, total // 2), LayerCut(4, total // 4))

    def layer_signals(self, layers):
        return SIGNALS

    def observe(self, signal, inputs, outputs, valid):
        assert valid is None or valid.shape == inputs.shape[:2]
        return inputs.float().norm(dim=-1) + outputs.float().norm(dim=-1)

    def select_at_layer(self, batch):
        self.batches.append(batch)
        if batch.probed is not None:
            assert batch.probed.positions.shape == batch.hidden.shape[:2]
        batch.memory["cuts"] = [*batch.memory.get("cuts", ()), batch.layer]
        kept = [torch.arange(0, 2 * budget, 2) for budget in batch.budgets]
        return Selection(torch.cat(kept), batch.budgets)


def run(need, padding, **inputs):
    model, method = DEEP_LLAVA.build(torch.float32), Noting(need=need)
    given = DEEP_LLAVA.inputs(ROWS, padding)
    with torch.no_grad(), vlmprune.pruned(model, method):
        model(**given, **inputs)
        record = vlmprune.last_run(model)
    return model, given, method.batches, record


def images_of(given):
    return [
        (row, columns)
        for row in range(len(ROWS))
        for columns in (given["input_ids"][row] == IMAGE_TOKEN).nonzero().flatten().split(36)
        if len(columns)
    ]


def host(model, given):
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**given, output_attentions=True, output_hidden_states=True)
    finally:
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("need", [TEXT_BEFORE_CUT, TEXT_AT_CUT, VISUAL_AT_CUT], ids=lambda need: need.name)
def test_attention_of_asked_rows_is_the_hosts(need, padding):
    model, given, batches, _ = run(need, padding)
    output = host(model, given)
    batch = batches[0]
    assert [each.layer for each in batches] == [2, 4]
    assert batches[1].memory["cuts"] == [2, 4]
    maps = output.attentions[1 if need.probe == "layer before" else 2]
    present = given["attention_mask"].bool()
    torch.testing.assert_close(batch.hidden[present], output.hidden_states[2][present], atol=1e-4, rtol=1e-4)
    whole = batch.attention_of([span.after for span in batch.text], reduce_heads="none")
    mean = batch.attention_of(batch.columns, reduce_queries="mean")
    for image, (row, columns) in enumerate(images_of(given)):
        assert batch.columns[image].tolist() == columns.tolist()
        text = given["attention_mask"][row].bool() & (given["input_ids"][row] != IMAGE_TOKEN)
        after = [column for column in text.nonzero().flatten().tolist() if column > columns.max()]
        assert batch.text[image].after.tolist() == after
        torch.testing.assert_close(
            whole[image], maps[row][:, after][..., columns].transpose(0, 1), atol=1e-6, rtol=1e-4
        )
        torch.testing.assert_close(mean[image], maps[row][:, columns][..., columns].mean((0, 1)), atol=1e-6, rtol=1e-4)
    torch.testing.assert_close(batch.normalize(batch.hidden), model.model.language_model.norm(batch.hidden))


def test_text_around_images():
    _, given, batches, _ = run(HIDDEN_AT_CUT, "left")
    words = [[len(part) for part in span] for span in batches[0].text]
    # In front of the image, behind it up to the next one, behind it.
    assert words == [[3, 9, 9], [2, 1, 14], [1, 13, 13], [5, 2, 2]]
    for span, (row, columns) in zip(batches[0].text, images_of(given), strict=True):
        assert span.next.tolist() == list(range(columns.max() + 1, columns.max() + 1 + len(span.next)))
        assert span.before.tolist() == list(range(columns.min() - len(span.before), columns.min()))
        assert given["attention_mask"][row, span.after].all()
    # At the second cut the same words stand in other columns.
    later = batches[1]
    for span, row, first in zip(later.text, later.rows, batches[0].text, strict=True):
        assert [len(part) for part in span] == [len(part) for part in first]
        assert later.valid is None or later.valid[row, span.after].all()
    assert [span.after.max().item() for span in later.text] == [later.hidden.shape[1] - 1] * 4


@pytest.mark.parametrize("padding", ["left", "right"])
def test_keys_values_entries_and_signals(padding):
    model, given, batches, record = run(VALUES_BEFORE_CUT, padding)
    output, embeddings = host(model, given), merged_embeddings(model, given)
    layers, first, second = model.model.language_model.layers, *batches
    attention = layers[1].self_attn
    normed = layers[1].input_layernorm(output.hidden_states[1])
    present = given["attention_mask"].bool()
    for read, projected in (
        (first.probed.key_states, attention.k_proj),
        (first.probed.value.flatten(2), attention.v_proj),
    ):
        torch.testing.assert_close(read[present], projected(normed)[present], atol=1e-4, rtol=1e-4)
    assert torch.equal(first.probed.rotate(torch.zeros_like(first.probed.key)), torch.zeros_like(first.probed.key))
    for image, (row, columns) in enumerate(images_of(given)):
        torch.testing.assert_close(first.entry[image].visual, embeddings[row, columns])
        torch.testing.assert_close(first.entry[image].text, embeddings[row, first.text[image].after])
        torch.testing.assert_close(second.entry[image].visual, embeddings[row, columns])
        assert second.indices[image].tolist() == list(range(0, 36, 2))
        last = given["attention_mask"][row].nonzero().max()
        wanted = output.attentions[0].mean(1)[row, last, columns]
        offset = slice(first.offsets[image], first.offsets[image + 1])
        torch.testing.assert_close(first.signals[SIGNALS[0]][offset], wanted, atol=1e-6, rtol=1e-4)
        out = output.hidden_states[2][row, columns] - output.hidden_states[1][row, columns]
        assert not torch.equal(out, torch.zeros_like(out))
        later = slice(second.offsets[image], second.offsets[image + 1])
        for signal in SIGNALS:
            assert torch.equal(second.signals[signal][later], first.signals[signal][offset][::2])
        stages = record.images[image].stage_groups
        assert [layer for layer, _ in stages] == [2, 4]
        assert stages[1][1].tolist() == [place // 2 if place % 2 == 0 else -1 for place in range(18)]


@dataclass(frozen=True, kw_only=True)
class Appending(Noting):
    """Keeps the tokens as they are, but the even ones first and the odd ones behind them, and half of all."""

    shift: float = 0.0

    def schedule(self, total, layers):
        return (LayerCut(2, total // 2),)

    def select_at_layer(self, batch):
        kept, values = [], []
        for row, columns, budget in zip(batch.rows, batch.columns, batch.budgets, strict=True):
            order = torch.cat([torch.arange(0, budget, 2), torch.arange(1, budget, 2)])
            kept.append(order)
            values.append(batch.hidden[row, columns[order]] + self.shift)
        return Selection(torch.cat(kept), batch.budgets, features=torch.cat(values))


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_rows_in_another_order(compact, padding):
    """Appended rows are later in the sequence: with gapless positions they have later ones, else their own."""
    model, given = DEEP_LLAVA.build(torch.float32), DEEP_LLAVA.inputs(ROWS, padding)
    positions = "compact" if compact else "original"
    with torch.no_grad(), vlmprune.pruned(model, Appending(), positions=positions):
        logits = model(**given).logits
        record = vlmprune.last_run(model)
        tokens = model.generate(**given, max_new_tokens=4, do_sample=False)[:, -4:] if padding == "left" else None
    with torch.no_grad(), vlmprune.pruned(model, Appending(shift=1.0), positions=positions):
        assert not torch.allclose(model(**given).logits, logits, atol=1e-3)
    assert record.images[0].kept.tolist() == [*range(0, 18, 2), *range(1, 18, 2)]
    for row in range(len(ROWS)):
        columns = record.kept_columns(row, 7)
        by_hand = row_by_hand(model, given, record, row, compact, entry_compact=False)
        torch.testing.assert_close(logits[row, columns], by_hand, atol=2e-4, rtol=2e-4)
        if tokens is not None:
            with torch.no_grad(), vlmprune.pruned(model, Appending(), positions=positions):
                alone = model.generate(**DEEP_LLAVA.inputs([ROWS[row]]), max_new_tokens=4, do_sample=False)
            assert alone[0, -4:].tolist() == tokens[row].tolist()
