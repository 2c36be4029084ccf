"""M-RoPE: kept tokens keep their positions, and whatever follows continues as in the unpruned model."""

import copy
import threading

import pytest
import torch

import vlmprune
from support.deeper import deeper
from support.families.qwen2_5_vl import QWEN2_5_VL
from support.families.qwen2_vl import QWEN2_VL
from support.families.qwen3_vl import QWEN3_VL
from support.families.qwen_case import token_types
from support.families.rotary import alive_columns, new_tokens, rotary_positions
from support.matrix import METHOD_PARAMETERS
from support.oracle import suppressed

ROWS = [[3, "A", 4], [2, "small", 1, "large", 6], [9], ["video small", 1, "B", 2]]
GREEDY = {"max_new_tokens": 4, "do_sample": False}
over_cases = pytest.mark.parametrize("case", [QWEN2_VL, QWEN2_5_VL, QWEN3_VL], ids=repr)
pytestmark = pytest.mark.usefixtures("no_gradients")


@pytest.fixture(name="no_gradients")
def _no_gradients():
    with torch.no_grad():
        yield


def both_ways(model, run, method="divprune", **parameters):
    """Positions of all language model calls of `run()`, unpruned and pruned, and the record of the pruned one."""
    model.model.rope_deltas = None
    with rotary_positions(model) as plain:
        run()
    model.model.rope_deltas = None
    with vlmprune.pruned(model, method, keep=0.3, **parameters), rotary_positions(model) as pruned:
        run()
        record = vlmprune.last_run(model)
    assert len(plain) == len(pruned)
    return plain, pruned, record


def check_prefill(plain, pruned, ids, mask, record):
    """Rows are packed to the right."""
    for row in range(len(ids)):
        columns = alive_columns(ids, mask, record, row)
        assert pruned[:, row, -len(columns) :].tolist() == plain[:, row, columns].tolist()


def prompt(case, rows=ROWS, padding="left"):
    return case.inputs(rows, padding)


@over_cases
def test_generate(case):
    model, inputs = case.build(torch.float32), prompt(case)
    plain, pruned, record = both_ways(model, lambda: model.generate(**inputs, **GREEDY))
    check_prefill(plain[0], pruned[0], inputs["input_ids"], inputs["attention_mask"], record)
    assert all(torch.equal(one, other) for one, other in zip(plain[1:], pruned[1:], strict=True))
    assert not torch.equal(plain[0][0], plain[0][1]), "the case must have positions that differ between axes"


@over_cases
def test_beams_and_return_sequences(case):
    model, inputs = case.build(torch.float32), prompt(case, ROWS[:3])
    options = {"num_beams": 3, "num_return_sequences": 2, **GREEDY}
    plain, pruned, _ = both_ways(model, lambda: model.generate(**inputs, **options))
    assert pruned[0].shape[1] == 9
    assert all(torch.equal(one, other) for one, other in zip(plain[1:], pruned[1:], strict=True))


@over_cases
@pytest.mark.parametrize("rows", [ROWS[:1], [["A", 2], [3, "B", 5]][:1] * 2], ids=["single", "equal rows"])
def test_loop_without_a_mask(case, rows):
    model, inputs = case.build(torch.float32), prompt(case, rows)
    ids, mask = inputs["input_ids"], inputs.pop("attention_mask")

    def run():
        cache = model(**inputs).past_key_values
        for _ in range(3):
            cache = model(input_ids=new_tokens(len(rows)), past_key_values=cache).past_key_values
        model(input_ids=new_tokens(len(rows)).expand(-1, 4), past_key_values=cache)

    plain, pruned, record = both_ways(model, run)
    check_prefill(plain[0], pruned[0], ids, mask, record)
    assert all(torch.equal(one, other) for one, other in zip(plain[1:], pruned[1:], strict=True))


@over_cases
@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize("axes", [3, 4, None])
def test_loop_with_positions(case, padding, axes):
    model, inputs = case.build(torch.float32), prompt(case, padding=padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    whole = case.positions(model, inputs)
    following = whole.amax((0, 2))[:, None]

    def run():
        output, seen = model(**inputs), mask
        for number in range(3):
            seen = torch.cat([seen, seen.new_ones(len(seen), 1)], 1)
            positions = following + number + 1
            if axes:
                positions = positions.expand(axes, -1, -1)
            output = model(
                input_ids=new_tokens(len(ids)),
                attention_mask=seen,
                position_ids=positions,
                past_key_values=output.past_key_values,
            )

    plain, pruned, record = both_ways(model, run)
    check_prefill(plain[0], pruned[0], ids, mask, record)
    assert all(torch.equal(one, other) for one, other in zip(plain[1:], pruned[1:], strict=True))


@over_cases
@pytest.mark.parametrize("padding", ["left", "right"])
def test_loop_with_a_mask(case, padding):
    """The unpruned host fails here, because it makes positions for the whole mask; the pruned model takes the new ones."""
    model, inputs = case.build(torch.float32), prompt(case, padding=padding)
    ids, mask = inputs["input_ids"], inputs["attention_mask"]
    following = case.positions(model, inputs).amax((0, 2))
    with vlmprune.pruned(model, "divprune", keep=0.3), rotary_positions(model) as pruned:
        output = model(**inputs)
        for _ in range(2):
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], 1)
            output = model(input_ids=new_tokens(len(ids)), attention_mask=mask, past_key_values=output.past_key_values)
    for number, positions in enumerate(pruned[1:]):
        assert positions.tolist() == (following + number + 1)[None, :, None].expand(3, -1, -1).tolist()


@over_cases
def test_prompt_as_embeddings(case):
    model, inputs = case.build(torch.float32), prompt(case, ROWS[:2])
    ids = inputs.pop("input_ids")
    inputs["inputs_embeds"] = model.get_input_embeddings()(ids)
    inputs["position_ids"] = case.positions(model, {**inputs, "input_ids": ids})
    plain, pruned, record = both_ways(model, lambda: model(**inputs))
    check_prefill(plain[0], pruned[0], ids, inputs["attention_mask"], record)


@over_cases
@pytest.mark.parametrize("types", [False, True], ids=["ids only", "token types"])
@pytest.mark.parametrize("rows", [ROWS[:1], ROWS[:3]], ids=["single", "padded"])
def test_second_turn_of_text(case, types, rows):
    model, first = case.build(torch.float32), prompt(case, rows)

    def run():
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, new_tokens(len(rows)).expand(-1, 3)], 1)
        mask = torch.cat([first["attention_mask"], torch.ones(len(rows), 7, dtype=torch.int64)], 1)
        given = {"input_ids": ids, "attention_mask": mask, "past_key_values": turn.past_key_values}
        if types:
            given["mm_token_type_ids"] = token_types(ids)
        model.generate(**given, **GREEDY)

    plain, pruned, _ = both_ways(model, run)
    # 4 calls a turn: the prompt, then three tokens (the last new one is not fed back).
    assert len(plain) == 8
    assert all(
        torch.equal(one, other) for one, other in zip(plain[1:4] + plain[5:], pruned[1:4] + pruned[5:], strict=True)
    )
    assert torch.equal(plain[4], pruned[4])


@over_cases
def test_second_turn_with_an_image(case):
    model = case.build(torch.float32)
    first, second = case.inputs([[3, "A", 4], [2, "small", 9]]), case.inputs([[2, "C", 5], [2, "large", 5]])
    second_columns = second["input_ids"].shape[1]

    def run():
        turn = model.generate(**first, **GREEDY, return_dict_in_generate=True)
        ids = torch.cat([turn.sequences, second["input_ids"]], 1)
        answer = torch.ones(2, GREEDY["max_new_tokens"], dtype=torch.int64)
        mask = torch.cat([first["attention_mask"], answer, second["attention_mask"]], 1)
        whole = case.longer(model, [first, second], ids, mask)
        model.generate(**whole, past_key_values=turn.past_key_values, **GREEDY)

    plain, pruned, record = both_ways(model, run)
    tail = second["attention_mask"]
    # The token before the second prompt was not fed back in the first turn.
    assert plain[4].shape[-1] == second_columns + 1
    check_prefill(plain[4][:, :, 1:], pruned[4][:, :, 1:], second["input_ids"], tail, record)
    assert all(torch.equal(one, other) for one, other in zip(plain[5:], pruned[5:], strict=True))


@over_cases
def test_deltas_of_the_host_are_those_of_the_whole_prompt(case):
    model, inputs = case.build(torch.float32), prompt(case)
    model(**inputs)
    expected = model.model.rope_deltas
    model.model.rope_deltas = None
    with vlmprune.pruned(model, "divprune", keep=0.3):
        model(**inputs)
        assert torch.equal(model.model.rope_deltas, expected)
        model.generate(**inputs, **GREEDY)
        assert torch.equal(model.model.rope_deltas, expected)


@over_cases
def test_a_copy_does_not_write_to_the_original(case):
    model, inputs = copy.deepcopy(case.build(torch.float32)), prompt(case, ROWS[:2])
    vlmprune.apply(model, "fastervlm", keep=0.3)
    expected = model.generate(**inputs, **GREEDY)
    other = copy.deepcopy(model)
    model.model.rope_deltas = None
    assert torch.equal(other.generate(**inputs, **GREEDY), expected)
    assert model.model.rope_deltas is None
    vlmprune.remove(model)
    assert torch.equal(other.generate(**inputs, **GREEDY), expected)


@over_cases
def test_threads_with_equal_prompts(case):
    """Both write the same `rope_deltas`; the rest of a call is its own."""
    model, inputs = case.build(torch.float32), prompt(case, ROWS[:3])
    results, barrier = [None] * 3, threading.Barrier(3)
    with vlmprune.pruned(model, "divprune", keep=0.3):
        expected = model.generate(**inputs, **GREEDY)

        def work(index):
            barrier.wait()
            with torch.no_grad():
                results[index] = model.generate(**inputs, **GREEDY)

        threads = [threading.Thread(target=work, args=(index,)) for index in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert all(torch.equal(result, expected) for result in results)


@over_cases
def test_an_image_by_hand_in_the_second_turn(case):
    """Without a mask the host counts on from the cache, for new images too; so does the pruned model."""
    model = case.build(torch.float32)
    first, second = (prompt(case, [row]) for row in ([3, "A", 4], [2, "small", 5]))
    mask = second["attention_mask"]
    del first["attention_mask"], second["attention_mask"]

    def run():
        cache = model(**first).past_key_values
        cache = model(**second, past_key_values=cache).past_key_values
        model(input_ids=new_tokens(1), past_key_values=cache)

    plain, pruned, record = both_ways(model, run)
    check_prefill(plain[1], pruned[1], second["input_ids"], mask, record)
    assert torch.equal(plain[2], pruned[2])


@over_cases
@pytest.mark.parametrize("method", ["divprune", "fastv", "pyramiddrop", "todre"])
@pytest.mark.parametrize("positions", [None, "compact"])
def test_loops_agree_with_generate(case, method, positions):
    """The three ways to write a loop, for methods that drop before and inside the language model."""
    case = deeper(case)
    model, inputs = case.build(torch.float32), prompt(case, ROWS[:1])
    following = case.positions(model, inputs).max() + 1
    with vlmprune.pruned(model, method, keep=0.5, positions=positions, **METHOD_PARAMETERS[method]):
        expected = model.generate(**inputs, max_new_tokens=5, do_sample=False)[0, -5:].tolist()
        for way in ("nothing", "mask", "positions"):
            mask = inputs["attention_mask"]
            output, tokens = model(**inputs), []
            for number in range(5):
                tokens.append(int(suppressed(output.logits[0, -1]).argmax()))
                mask = torch.cat([mask, mask.new_ones(1, 1)], 1)
                given = {
                    "mask": {"attention_mask": mask},
                    "positions": {"position_ids": (following + number).view(1, 1)},
                }
                output = model(
                    input_ids=torch.tensor([tokens[-1:]]),
                    past_key_values=output.past_key_values,
                    **given.get(way, {}),
                )
            assert tokens == expected, way
