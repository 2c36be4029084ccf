"""What the methods score by is the host's own attention; decisions are made row by row."""

from dataclasses import dataclass, field

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA

import vlmprune
from support.tiny_models import IMAGE_TOKEN
from vlmprune.methods import FastV, PyramidDrop, ToDRERelevance
from vlmprune.methods.layer.todre_relevance import relevance_shares

ROWS = [[3, "A", 4], [2, "B", 1, "C", 6], [9], [5, "D", 2]]


@dataclass(frozen=True, kw_only=True)
class NotingFastV(FastV):
    batches: list = field(default_factory=list)

    def select_at_layer(self, batch):
        self.batches.append(batch)
        return super().select_at_layer(batch)


@dataclass(frozen=True, kw_only=True)
class NotingPyramid(PyramidDrop):
    batches: list = field(default_factory=list)

    def select_at_layer(self, batch):
        self.batches.append(batch)
        return super().select_at_layer(batch)


@dataclass(frozen=True, kw_only=True)
class NotingRelevance(ToDRERelevance):
    batches: list = field(default_factory=list)

    def select_at_layer(self, batch):
        self.batches.append(batch)
        return super().select_at_layer(batch)


@pytest.fixture
def model():
    return DEEP_LLAVA.build(torch.float32)


def host_attention(model, inputs):
    """The eager attention maps of the unpruned model, `[batch, heads, tokens, tokens]` per layer."""
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            return model(**inputs, output_attentions=True).attentions
    finally:
        model.set_attn_implementation("sdpa")


def images_of(inputs):
    """Row and columns of each image, all of 36 tokens."""
    return [
        (row, columns)
        for row in range(len(ROWS))
        for columns in (inputs["input_ids"][row] == IMAGE_TOKEN).nonzero().flatten().split(36)
        if len(columns)
    ]


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(
    "method", [NotingFastV(layer=3, ratio=0.5), NotingPyramid(layers=(2,), ratios=(0.5,))], ids=["fastv", "pyramiddrop"]
)
def test_scores_are_the_row_of_the_last_prompt_token_in_layer_2(model, method, padding):
    inputs = DEEP_LLAVA.inputs(ROWS, padding)
    maps = host_attention(model, inputs)[2].mean(1)
    method.batches.clear()
    with torch.no_grad(), vlmprune.pruned(model, method):
        model(**inputs)
    (batch,) = method.batches
    assert batch.rows == (0, 1, 1, 3)
    for scores, (row, columns) in zip(batch.attention.split(list(batch.counts)), images_of(inputs), strict=True):
        last = inputs["attention_mask"][row].nonzero().max()
        torch.testing.assert_close(scores, maps[row, last, columns], atol=1e-6, rtol=1e-4)
    assert batch.attention.dtype == torch.float32


@pytest.mark.parametrize("padding", ["left", "right"])
def test_relevance_shares_are_those_of_the_hosts_attention(model, padding):
    inputs = DEEP_LLAVA.inputs(ROWS, padding)
    maps = host_attention(model, inputs)[2].sum(1)
    method = NotingRelevance(layer=3, tau=0.0)
    with torch.no_grad(), vlmprune.pruned(model, method):
        model(**inputs)
    to_visual, to_text = relevance_shares(method.batches[0].probed)
    for row in (0, 1, 3):
        visual = inputs["input_ids"][row] == IMAGE_TOKEN
        text = inputs["attention_mask"][row].bool() & ~visual & (visual.cumsum(0) > 0)
        wanted = maps[row][text][:, visual].sum() / maps[row][text].sum()
        torch.testing.assert_close(to_visual[row], wanted, atol=1e-5, rtol=1e-4)
        wanted = maps[row][visual][:, text].sum() / maps[row][visual].sum()
        torch.testing.assert_close(to_text[row], wanted, atol=1e-5, rtol=1e-4)
    assert to_text[0] == to_text[3] == 0 < to_text[1]


def test_relevance_is_decided_row_by_row(model):
    inputs = DEEP_LLAVA.inputs(ROWS)
    noting = NotingRelevance(layer=3, tau=0.0)
    with torch.no_grad(), vlmprune.pruned(model, noting):
        model(**inputs)
        assert [set(row) for row in vlmprune.last_run(model).visual_tokens_per_layer] == [{36}, {72}, {0}, {36}]
    shares = torch.stack(relevance_shares(noting.batches[0].probed)).amax(0)[[0, 1, 3]]
    tau = float(shares.sort().values[:2].mean())
    with torch.no_grad(), vlmprune.pruned(model, ToDRERelevance(layer=3, tau=tau)):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        dropped = int(torch.tensor([0, 1, 3])[shares.argmin()])
        for row, total in ((0, 36), (1, 72), (3, 36)):
            after = 0 if row == dropped else total
            assert run.visual_tokens_per_layer[row] == [total] * 3 + [after] * 5
            alone = model(**DEEP_LLAVA.inputs([ROWS[row]])).logits[0, -1]
            torch.testing.assert_close(logits[row, -1], alone, atol=2e-4, rtol=2e-4)
        tokens = model.generate(**inputs, max_new_tokens=4, do_sample=False)
        for row, prompt in enumerate(ROWS):
            alone = model.generate(**DEEP_LLAVA.inputs([prompt]), max_new_tokens=4, do_sample=False)
            assert torch.equal(tokens[row, -4:], alone[0, -4:])


def test_scores_of_a_later_turn_count_the_earlier_one(model):
    """The softmax runs over the cached tokens too, so the scores of the second image sum to less than one."""
    method = NotingPyramid(layers=(2,), ratios=(0.5,))
    first, second = DEEP_LLAVA.inputs([[3, "A", 4]]), DEEP_LLAVA.inputs([[2, "C", 5]])
    with torch.no_grad(), vlmprune.pruned(model, method):
        cache = model(**first, use_cache=True).past_key_values
        model(
            input_ids=second["input_ids"],
            pixel_values=second["pixel_values"],
            attention_mask=torch.ones(1, 86, dtype=torch.long),
            past_key_values=cache,
        )
    assert len(method.batches) == 2
    assert method.batches[1].attention.sum() < method.batches[0].attention.sum()
