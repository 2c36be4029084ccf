"""One cell of the decoding matrix: a wrapped pruned model, its prompts, and the check of what it says against the oracle."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import vlmprune
from support.layerwise import default_positions, language_model_inputs, row_by_layers
from support.matrix import FOLLOW_THE_QUESTION, METHOD_PARAMETERS
from support.tiny_models import FamilyCase

KEEP = 0.4
ROWS = [[3, "A", 4], [2, "B", 1, "small", 6], [9]]


@cache
def plain_model(case: FamilyCase) -> Any:
    """Return the unpatched model that the oracle runs on."""
    return copy.deepcopy(case.build(torch.float32))


@dataclass
class Call:
    """A pruned model in a wrapper, and how `generate` is to keep its cache.

    Attributes:
        case: the family.
        method: name of the applied method.
        model: the pruned model as the wrapper gives it.
        inputs: a batch of prompts.
        cache: options of `generate` that choose the cache.
        lossy: whether the cache holds rounded values, so that only the first token is exact.
    """

    case: FamilyCase
    method: str
    model: Any
    inputs: dict[str, Tensor]
    cache: dict[str, Any] = field(default_factory=dict)
    lossy: bool = False

    @property
    def new_tokens(self) -> int:
        """Tokens to generate: without a cache every step is a prefill, where a method that asks the last token chooses anew."""
        return 1 if self.cache.get("use_cache") is False and self.method in FOLLOW_THE_QUESTION else 4

    def apply(self) -> None:
        """Apply the method to the wrapped model."""
        vlmprune.apply(self.model, self.method, keep=KEEP, **METHOD_PARAMETERS[self.method])

    @property
    def record(self) -> Any:
        """What the latest prefill kept; nothing may have passed unpruned."""
        record = vlmprune.last_run(self.model)
        assert record.images, "the latest prefill saw no image"
        assert all(len(image.kept) < image.total for image in record.images), "an image was not pruned"
        return record

    def single(self) -> Call:
        """Return the same with the first prompt alone."""
        return Call(self.case, self.method, self.model, self.case.inputs(ROWS[:1]), self.cache, self.lossy)

    def generate(self, **options: Any) -> Any:
        """Call `generate`; the logits of every step must be those of the oracle for the tokens that it chose."""
        model = getattr(self.model, "module", self.model)
        chosen = {"max_new_tokens": self.new_tokens, "do_sample": False, **self.cache, **options}
        output = model.generate(**self.inputs, **chosen, return_dict_in_generate=True, output_logits=True)
        self.check_steps(output, self.record)
        return output

    def check_steps(self, output: Any, record: Any, prompt: dict[str, Tensor] | None = None, start: int = 0) -> None:
        """Assert that the raw logits of all steps are those of the oracle.

        Args:
            output: what `generate` returned.
            record: what the prefill kept.
            prompt: the prompt with the images; the call's own if not given.
            start: tokens after that prompt that were there before this `generate`.
        """
        prompt = self.inputs if prompt is None else prompt
        copies = len(output.sequences) // len(prompt["input_ids"])
        width = prompt["input_ids"].shape[1]
        for row, sequence in enumerate(output.sequences):
            new = sequence[width:]
            expected = self.by_hand(prompt, record, row // copies, new[:-1], row)[start:]
            got = torch.stack([step[row] for step in output.logits])
            exact = start == 0 if self.lossy else len(got)
            torch.testing.assert_close(got[:exact], expected[:exact], atol=5e-4, rtol=5e-4)
            # Rounded keys and values: close to the oracle, and clearly closer than to the unpruned model.
            assert torch.cosine_similarity(got, expected).min() > 0.8

    def by_hand(self, prompt: dict[str, Tensor], record: Any, row: int, later: Tensor, record_row: int) -> Tensor:
        """Return the oracle's logits of the last prompt token and of `later` ones, `[1 + later, vocabulary]`."""
        plain = plain_model(self.case)
        kept = copy.copy(record)
        kept.__dict__["images"] = [_moved(image, row) for image in record.images if image.batch_index == record_row]
        given = language_model_inputs(plain, prompt)
        positions = default_positions(plain, self.method)
        return row_by_layers(plain, prompt, kept, row, positions, later, given).logits[-1 - len(later) :]

    def check_forward(self, logits: Tensor) -> None:
        """Assert that `logits [batch, columns, vocabulary]` of a forward are the oracle's at all tokens that are alive."""
        record, plain = self.record, plain_model(self.case)
        given, positions = language_model_inputs(plain, self.inputs), default_positions(plain, self.method)
        for row in range(len(logits)):
            by_hand = row_by_layers(plain, self.inputs, record, row, positions, given=given)
            torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=5e-4, rtol=5e-4)


def _moved(image: Any, row: int) -> Any:
    moved = copy.copy(image)
    object.__setattr__(moved, "batch_index", row)
    return moved
