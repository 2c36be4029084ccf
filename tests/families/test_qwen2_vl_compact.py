"""`positions="compact"` with M-RoPE: ids that nothing uses any more are taken out, counted by hand."""

import pytest
import torch

import vlmprune
from support.families.by_hand import language_model_inputs, placeholders
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen2_vl import QWEN2_VL
from support.families.qwen3_vl import QWEN3_VL
from support.families.rotary import alive_columns, new_tokens, rotary_positions
from support.oracle import suppressed

GREEDY = {"max_new_tokens": 4, "do_sample": False}
ROWS = [[3, "A", 4], [2, "small", 1, "large", 6], [9], [1, "video large", 1, "B", 2]]
over_cases = pytest.mark.parametrize("case", [QWEN2_VL, QWEN2_5_VL, QWEN3_VL], ids=repr)
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(name="no_gradients")
def _no_gradients():
    with torch.no_grad():
        yield


def closed(ids, before, after):
    """Lower each id by the ids below it that `before` holds and `after` does not."""
    gone = set(before.flatten().tolist()) - set(after.flatten().tolist())
    return torch.tensor([[one - sum(other < one for other in gone) for one in axis] for axis in ids.tolist()])


def by_hand(case, model, inputs, record, row):
    """Columns that stay, and their ids `[3, kept]` and those of the unpruned row."""
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    columns = alive_columns(ids, mask, record, row)
    whole = case.positions(model, inputs)[:, row]
    full = whole[:, mask[row].bool()]
    return columns, closed(whole[:, columns], full, whole[:, columns]), full


def following(full, compact, count):
    """Ids of `count` tokens after a prompt."""
    first = full.max() + 1 - len(set(full.flatten().tolist()) - set(compact.flatten().tolist()))
    return (first + torch.arange(count)).expand(3, -1)


def lm_logits(model, inputs, given, row, columns, ids, later):
    """Logits of the unpruned language model on columns of a row and the tokens `later`."""
    visual = placeholders(model, inputs["input_ids"])
    table = torch.cat([given["inputs_embeds"][row, columns], model.get_input_embeddings()(later)])
    deep = {}
    if given.get("deepstack_visual_embeds") is not None:
        rank = (visual.flatten().cumsum(0).view_as(visual)[row] - 1)[columns[visual[row, columns]]]
        mask = torch.cat([visual[row, columns], torch.zeros(len(later), dtype=torch.bool)])
        deep = {
            "visual_pos_masks": mask[None],
            "deepstack_visual_embeds": [layer[rank] for layer in given["deepstack_visual_embeds"]],
        }
    output = model.model.language_model(inputs_embeds=table[None], position_ids=ids[:, None], use_cache=False, **deep)
    return model.lm_head(output.last_hidden_state)[0]


@over_cases
@pytest.mark.parametrize("keep", [0.1, 2, 1])
@pytest.mark.parametrize("padding", ["left", "right"])
def test_prefill_and_decode(case, keep, padding):
    model, inputs = case.build(torch.float32), case.inputs(ROWS, padding)
    given = language_model_inputs(model, inputs)
    with vlmprune.pruned(model, "divprune", keep, positions="compact"), rotary_positions(model) as seen:
        logits = model(**inputs).logits
        record = vlmprune.last_run(model)
        new = model.generate(**inputs, **GREEDY)[:, -4:] if padding == "left" else None
    closed_gaps = 0
    for row in range(len(ROWS)):
        columns, ids, full = by_hand(case, model, inputs, record, row)
        original = case.positions(model, inputs)[:, row, columns]
        closed_gaps += int((original - ids).max())
        assert seen[0][:, row, -len(columns) :].tolist() == ids.tolist()
        expected = lm_logits(model, inputs, given, row, columns, ids, new_tokens(0)[:, 0])
        torch.testing.assert_close(logits[row, columns], expected, atol=1e-4, rtol=1e-4)
        if new is None:
            continue
        later = following(full, original, 3)
        assert later[0, 0] == ids.max() + 1, "no gap between the prompt and the answer"
        assert torch.cat([call[:, row] for call in seen[2:]], 1).tolist() == later.tolist()
        answer = lm_logits(model, inputs, given, row, columns, torch.cat([ids, later], 1), new[row, :3])[-4:]
        assert suppressed(answer).argmax(-1).tolist() == new[row].tolist()
    assert closed_gaps > 0, "the case must have gaps"


@over_cases
def test_loop_and_second_turn(case):
    """After a compact prompt every later token moves down by what its row lost."""
    model, inputs = case.build(torch.float32), case.inputs(ROWS)
    mask = inputs["attention_mask"]
    whole = case.positions(model, inputs)
    with vlmprune.pruned(model, "divprune", 2, positions="compact"), rotary_positions(model) as seen:
        turn = model.generate(**inputs, **GREEDY, return_dict_in_generate=True)
        record = vlmprune.last_run(model)
        ids = torch.cat([turn.sequences, new_tokens(4).expand(-1, 3)], 1)
        longer = torch.cat([mask, torch.ones(4, 7, dtype=torch.int64)], 1)
        answer = model.generate(
            input_ids=ids,
            attention_mask=longer,
            past_key_values=turn.past_key_values,
            **GREEDY,
            return_dict_in_generate=True,
        )
        positions = whole.amax((0, 2))[:, None] + 1 + 7 + 4
        longer = torch.cat([longer, torch.ones(4, 4, dtype=torch.int64)], 1)
        model(
            input_ids=new_tokens(4),
            attention_mask=longer,
            position_ids=positions - 1,
            past_key_values=answer.past_key_values,
        )
    for row in range(4):
        columns, _, full = by_hand(case, model, inputs, record, row)
        later = following(full, whole[:, row, columns], 11)
        got = torch.cat([call[:, row] for call in seen[1:]], 1)
        assert got.tolist() == later.tolist()


@over_cases
def test_an_image_in_the_second_turn_closes_its_own_gaps(case):
    model = case.build(torch.float32)
    first, second = case.inputs([[3, "A", 4], [2, "small", 9]]), case.inputs([[2, "C", 5], [2, "large", 5]])
    both = case.inputs([[3, "A", 4, 4, 2, "C", 5], [2, "small", 9, 4, 2, "large", 5]])
    answer = torch.ones(2, 4, dtype=torch.int64)
    mask = torch.cat([first["attention_mask"], answer, second["attention_mask"]], 1)
    with vlmprune.pruned(model, "divprune", 2, positions="compact"):
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, second["input_ids"]], 1)
        with rotary_positions(model) as continued:
            whole = case.longer(model, [first, second], ids, mask)
            model.generate(**whole, past_key_values=turn.past_key_values, **GREEDY)
        with rotary_positions(model) as scratch:
            model.generate(**case.longer(model, [both], ids, mask), **GREEDY)
    count = continued[0].shape[-1]
    for row in range(2):
        text = min(count, 2 + 5 + 3 + 2)
        assert continued[0][:, row, -text:].tolist() == scratch[0][:, row, -text:].tolist()
    assert all(torch.equal(one, other) for one, other in zip(continued[1:], scratch[1:], strict=True))
