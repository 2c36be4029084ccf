"""Loops that decode by hand: positions and masks are those of the caller's sequence, anything else is refused."""

import pytest
import torch

import vlmprune
from support.caches import cache_lengths
from support.matrix import METHOD_PARAMETERS, over_sites
from support.oracle import suppressed
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.errors import UnsupportedCallError

ROWS = [[3, "A", 6]]


def loop(model, inputs, steps, arguments):
    """Greedy tokens by a loop whose every step passes `arguments(cache, step)` on."""
    output, tokens = model(**inputs, use_cache=True), []
    for step in range(steps):
        tokens.append(suppressed(output.logits[:, -1:]).argmax(-1))
        if step + 1 < steps:
            cache = output.past_key_values
            output = model(input_ids=tokens[-1], past_key_values=cache, **arguments(cache, step))
    return torch.cat(tokens, 1)


@over_sites
def test_loop_counts_by_the_cache(method, family):
    """What `get_seq_length` says is good for positions, for masks, and for what of a longer prompt is new."""
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    start = family.positions(model, inputs)[..., -1:]
    total = inputs["input_ids"].shape[1]
    loops = {
        "positions": lambda cache, step: {"position_ids": start + 1 + (cache.get_seq_length() - total)},
        "mask": lambda cache, step: {"attention_mask": torch.ones(1, cache.get_seq_length() + 1, dtype=torch.long)},
        "neither": lambda cache, step: {},
    }
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        wanted = model.generate(**inputs, max_new_tokens=5, do_sample=False)[:, total:]
        for arguments in loops.values():
            assert torch.equal(loop(model, inputs, 5, arguments), wanted)


@over_sites
def test_positions_of_the_short_cache_are_refused(method, family):
    model = family.build(torch.float32)
    inputs = family.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, method, keep=0.3, **METHOD_PARAMETERS[method]):
        cache = model(**inputs, use_cache=True).past_key_values
        removed = inputs["input_ids"].shape[1] - cache_lengths(cache)[-1]
        last = family.positions(model, inputs)[..., -1:]
        for short in (last, last + 1 - removed):
            with pytest.raises(UnsupportedCallError, match=r"position_ids of row 0 begin at .* go on at"):
                model(input_ids=torch.tensor([[5]]), position_ids=short, past_key_values=cache)
        model(input_ids=torch.tensor([[5]]), position_ids=last + 1, past_key_values=cache)
        with pytest.raises(UnsupportedCallError, match="position_ids"):
            model(input_ids=torch.tensor([[5]]), position_ids=last + 1, past_key_values=cache)


def test_short_positions_are_seen_after_many_steps_too():
    """By then they lie beyond the prompt."""
    model = LLAVA_CLIP_GQA.build(torch.float32)
    inputs = LLAVA_CLIP_GQA.inputs(ROWS)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.9):
        turn = model.generate(**inputs, max_new_tokens=8, do_sample=False, return_dict_in_generate=True)
        cache = turn.past_key_values
        short = torch.tensor([[cache_lengths(cache)[0]]])
        assert int(short) > inputs["input_ids"].shape[1]
        with pytest.raises(UnsupportedCallError, match="position_ids"):
            model(input_ids=torch.tensor([[5]]), position_ids=short, past_key_values=cache)


def test_short_positions_in_a_padded_batch():
    model = LLAVA_CLIP_GQA.build(torch.float32)
    inputs = LLAVA_CLIP_GQA.inputs([[3, "A", 4], [2, "B", 1, "C", 6], [9]])
    inputs["position_ids"] = LLAVA_CLIP_GQA.positions(model, inputs)
    mask = torch.cat([inputs["attention_mask"], torch.ones(3, 1, dtype=torch.long)], 1)
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=0.5):
        cache = model(**inputs, use_cache=True).past_key_values
        call = {"input_ids": torch.full((3, 1), 5), "attention_mask": mask, "past_key_values": cache}
        right = inputs["position_ids"][:, -1:] + 1
        with pytest.raises(UnsupportedCallError, match="row 1"):
            model(**call, position_ids=right - torch.tensor([[0], [36], [0]]))
        model(**call, position_ids=right)


def test_images_that_keep_all_tokens_may_share_positions():
    """The second image is small enough to be kept whole; its rows and columns count, not its tokens."""
    from support.families import qwen2_5_vl

    family = qwen2_5_vl.CASES[0]
    model = family.build(torch.float32)
    first, second = family.inputs([[3, "A", 4]]), family.inputs([[2, "small", 5]])
    both = family.inputs([[3, "A", 4, 2, "small", 5]])
    both["input_ids"] = torch.cat([first["input_ids"], second["input_ids"]], 1)
    positions = family.positions(model, both)
    length = first["input_ids"].shape[1]
    with torch.no_grad(), vlmprune.pruned(model, "divprune", keep=family.tokens("small")):
        cache = model(**first, use_cache=True).past_key_values
        mask = torch.ones(1, both["input_ids"].shape[1], dtype=torch.long)
        call = {**second, "attention_mask": mask, "past_key_values": cache}
        model(**call, position_ids=positions[..., length:])
        after = positions[..., -1:] + 1
        model(input_ids=torch.tensor([[5]]), position_ids=after, past_key_values=cache)
