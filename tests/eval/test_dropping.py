"""Background tokens dropped in training: what the language model sees is what a pruned model sees."""

import numpy as np
import pytest
import torch

pytest.importorskip("datasets")

from transformers import LlamaForCausalLM, Qwen2_5_VLForConditionalGeneration

from vlmprune.eval.training.common.answer_kept import answer_kept
from vlmprune.eval.training.common.bf16_attention import bf16_attention
from vlmprune.eval.training.common.dropping import Drop, draw_kept
from vlmprune.eval.training.common.language import SLOT, WIDTH, Prompts, answer, language_config
from vlmprune.eval.training.common.tokenizer import build_tokenizer
from vlmprune.eval.training.qwen.language import answer as qwen_answer
from vlmprune.eval.training.qwen.language import answer_kept as qwen_answer_kept
from vlmprune.eval.training.qwen.model import qwen_config
from vlmprune.eval.training.qwen.tokenizer import VisionPrompts
from vlmprune.eval.training.qwen.tokenizer import build_tokenizer as build_vision_tokenizer

ASKED = (("what colour is the circle?", "red"), ("how many squares?", "two"))


def slots(prompts, batch):
    pairs = [prompts.slot(*asked) for asked in ASKED]
    ids, labels = (torch.tensor([pair[part] for pair in pairs]).expand(batch, -1, -1) for part in (0, 1))
    return ids, labels


@pytest.mark.parametrize(("share", "bare"), [(0.0, 1.0), (0.5, 0.0)])
def test_things_are_never_dropped(share, bare):
    rng = np.random.default_rng(0)
    shown = torch.from_numpy(rng.random((4, 300)) < 0.2)
    kept, _ = draw_kept(shown, Drop(whole=0.0, bare=bare, most=share), rng)
    assert kept[shown].all()
    assert torch.equal(kept, shown) == (bare == 1.0)
    assert not kept.all()


def test_nothing_is_drawn_where_nothing_is_dropped():
    rng = np.random.default_rng(0)
    kept, compact = draw_kept(torch.zeros(2, 5, dtype=torch.bool), None, rng)
    assert kept.all()
    assert not compact
    assert rng.random() == np.random.default_rng(0).random()


def test_half_of_the_batches_are_renumbered():
    rng = np.random.default_rng(0)
    shown = torch.zeros(1, 9, dtype=torch.bool)
    drawn = [draw_kept(shown, Drop(whole=0.2, compact=0.5), rng) for _ in range(400)]
    assert 50 < sum(bool(kept.all()) for kept, _ in drawn) < 110
    assert 120 < sum(compact for _, compact in drawn) < 200


@pytest.fixture(scope="module")
def llama():
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    model = LlamaForCausalLM(language_config(tokenizer)).eval()
    for layer in model.model.layers:
        layer.self_attn.q_proj.weight.data *= 4
        layer.self_attn.k_proj.weight.data *= 4
    return model, Prompts(tokenizer)


@torch.no_grad()
def test_all_kept_is_what_the_whole_picture_gives(llama):
    model, prompts = llama
    ids, labels = slots(prompts, 2)
    visual = torch.randn(2, 10, WIDTH)
    whole = answer(model, prompts.prefix, visual, ids, labels, early=True)
    for compact in (False, True):
        found, index, valid = answer_kept(
            model, prompts.prefix, visual, torch.ones(2, 10, dtype=torch.bool), compact, ids, labels
        )
        torch.testing.assert_close(found.hidden[-1], whole.hidden[-1])
        torch.testing.assert_close(found.loss, whole.loss)
        assert torch.equal(index, torch.arange(10).expand(2, -1))
        assert valid.all()


@torch.no_grad()
@pytest.mark.parametrize("compact", [False, True])
def test_each_row_is_the_model_on_the_compacted_sequence(llama, compact):
    model, prompts = llama
    ids, labels = slots(prompts, 2)
    visual = torch.randn(2, 10, WIDTH)
    kept = torch.zeros(2, 10, dtype=torch.bool)
    kept[0, [1, 4, 5, 9]] = True
    kept[1, [0, 7]] = True
    found, _, valid = answer_kept(model, prompts.prefix, visual, kept, compact, ids, labels)
    assert valid.sum(1).tolist() == [4, 2]
    before = len(prompts.prefix)
    embed = model.get_input_embeddings()
    for row in range(2):
        places = kept[row].nonzero().flatten()
        text = embed(ids[row, 1])
        embeds = torch.cat([embed(torch.tensor(prompts.prefix)), visual[row, places], text])[None]
        position = torch.cat([torch.arange(before), before + places, before + 10 + torch.arange(SLOT)])
        if compact:
            position = torch.arange(embeds.shape[1])
        alone = model.model(
            inputs_embeds=embeds, position_ids=position[None], attention_mask=torch.ones(1, embeds.shape[1])
        )
        torch.testing.assert_close(
            found.hidden[-1][row, -SLOT:], alone.last_hidden_state[0, -SLOT:], atol=1e-4, rtol=1e-4
        )


@torch.no_grad()
def test_qwen_keeps_the_position_ids_of_the_whole_prompt():
    tokenizer = build_vision_tokenizer()
    torch.manual_seed(0)
    model = Qwen2_5_VLForConditionalGeneration(qwen_config(tokenizer)).eval().model.language_model
    for layer in model.layers:
        layer.self_attn.q_proj.weight.data *= 4
    prompts = VisionPrompts(tokenizer)
    ids, labels = slots(prompts, 2)
    visual = torch.randn(2, 12, WIDTH)
    whole = qwen_answer(model, prompts, visual, (3, 4), ids, labels)
    found = qwen_answer_kept(model, prompts, visual, (3, 4), torch.ones(2, 12, dtype=torch.bool), ids, labels)
    torch.testing.assert_close(found.loss, whole.loss)
    kept = torch.zeros(2, 12, dtype=torch.bool)
    kept[0, [2, 3, 7]] = True
    kept[1, 5] = True
    found = qwen_answer_kept(model, prompts, visual, (3, 4), kept, ids, labels)
    first = len(prompts.prefix)
    assert found.position[:, 0, first : first + 3].tolist() == [
        [first] * 3,
        [first, first, first + 1],
        [2 + first, 3 + first, 3 + first],
    ]
    assert torch.equal(found.position[:, 0, first + 3 :], whole.position[:, 0, first + 12 :])
    alone = [
        qwen_answer_kept(model, prompts, visual[row, None], (3, 4), kept[row, None], ids[:1], labels[:1])
        for row in range(2)
    ]
    torch.testing.assert_close(found.loss, (alone[0].loss + alone[1].loss) / 2)


def test_attention_in_bf16_is_attention():
    query, key, value = torch.randn(3, 2, 4, 9, 32)
    seen = torch.ones(2, 1, 9, 9, dtype=torch.bool).tril()
    found, _ = bf16_attention(None, query, key, value, seen, 32**-0.5)
    wanted = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=seen).transpose(1, 2)
    torch.testing.assert_close(found.float(), wanted, atol=0.05, rtol=0.05)
