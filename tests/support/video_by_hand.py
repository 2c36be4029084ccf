"""A pruned forward and its decode steps on videos, beside the same layers called by hand."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

import vlmprune
from support.layerwise import Positions, check_greedy, language_model_inputs, row_by_layers
from support.merging import entering, given_as_entered
from support.video_matrix import replaces_values

STEPS = 4


def check_by_hand(
    model: Any, inputs: dict[str, Tensor], method: str, applied: AbstractContextManager[Any], positions: Positions
) -> None:
    """Compare logits, counts and greedy tokens of every row under an `applied` method with the layers by hand."""
    with torch.no_grad(), applied, entering(model) as entered:
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
        new = model.generate(**inputs, max_new_tokens=STEPS, do_sample=False)[:, -STEPS:]
    given = language_model_inputs(model, inputs)
    if replaces_values(method):
        given = given_as_entered(model, given, entered[0], inputs, run)
    for row, layers in enumerate(run.visual_tokens_per_layer):
        by_hand = row_by_layers(model, inputs, run, row, positions, given=given)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)
        check_greedy(model, inputs, run, row, positions, new[row], given)
        assert layers[-1] == len(by_hand.columns) - run.text_tokens[row]
