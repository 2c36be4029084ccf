"""What is read of a call once, and how running calls are kept apart."""

import copy
import pickle
import threading

import pytest
import torch

from vlmprune.errors import UnsupportedCallError
from vlmprune.patches.calls import CallStack, LanguageModelCall, ModelCall

VISUAL = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0]]).bool()
PADDED = torch.tensor([[1, 1, 1, 1, 1], [0, 1, 1, 1, 1]])


class Cache:
    """A cache of three entries, as far as a call reads it."""

    def get_seq_length(self):
        return 3


def language_call(mask=PADDED, **arguments):
    model_call = ModelCall({"attention_mask": mask}, visual_mask=VISUAL)
    model_call.attention_mask = None if mask is None else mask.bool()
    return LanguageModelCall(model_call, {"inputs_embeds": torch.zeros(2, 5, 8), "attention_mask": mask, **arguments})


def test_text_is_what_is_neither_padding_nor_visual():
    call = language_call()
    assert (call.batch, call.columns) == (2, 5)
    assert call.text.tolist() == [[True, False, False, True, True], [False, True, False, False, True]]


def test_without_a_mask_every_column_is_valid():
    assert language_call(mask=None).valid.all()


def test_of_a_mask_over_the_whole_sequence_the_last_columns_count():
    longer = torch.cat([torch.zeros(2, 3, dtype=torch.int64), PADDED], dim=1)
    assert torch.equal(language_call(mask=longer).valid, PADDED.bool())


def test_reading_a_call_does_not_change_it():
    call = language_call()
    before = call.text.clone()
    keep = call.text.flatten().clone()
    keep[:] = True
    assert torch.equal(call.text, before)


def test_positions_count_on_from_the_cache():
    assert language_call().positions.tolist() == [[0, 1, 2, 3, 4]] * 2
    assert language_call(past_key_values=Cache()).positions.tolist() == [[3, 4, 5, 6, 7]] * 2


def test_positions_of_the_host_are_cut_to_the_new_tokens():
    whole = torch.arange(8).expand(3, 2, 8)
    call = language_call(position_ids=whole, past_key_values=Cache())
    assert call.positions.shape == (3, 2, 5)
    assert call.positions[0, 0].tolist() == [3, 4, 5, 6, 7]


@pytest.mark.parametrize("mask", [torch.zeros(2, 1, 5, 5), {"full_attention": None}], ids=["4-D", "dictionary"])
def test_other_masks_are_refused_by_what_they_are(mask):
    call = language_call()
    call.arguments["attention_mask"] = mask
    with pytest.raises(UnsupportedCallError, match=r"4-D tensor|dict"):
        call.check_mask()


def test_every_thread_has_running_calls_of_its_own():
    stack, seen = CallStack(), []
    stack.model.append(ModelCall({}))
    thread = threading.Thread(target=lambda: seen.append(list(stack.model)))
    thread.start()
    thread.join()
    assert seen == [[]]
    assert len(stack.model) == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda stack: pickle.loads(pickle.dumps(stack))])
def test_a_copy_begins_without_running_calls(copied):
    stack = CallStack()
    stack.model.append(ModelCall({}))
    assert copied(stack).model == []
