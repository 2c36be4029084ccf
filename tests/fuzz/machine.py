"""Random call sequences on one cache of a pruned model: each step equals the oracle, or is refused by an error of ours."""

from __future__ import annotations

import copy
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any, ClassVar

import hypothesis.strategies as st
import torch
from fuzz.caller_sequence import CallerSequence, layers_seen, row_logits
from hypothesis import event, note
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import Tensor
from transformers import DynamicCache

import vlmprune
from support.families.qwen_case import QwenCase, token_types
from support.family_cases import FAMILY_CASES
from support.layerwise import MERGED_INSIDE, Positions, default_positions, language_model_inputs, placeholders
from support.matrix import MATRIX, METHOD_PARAMETERS, REQUIRED, croppable, few_tokens
from support.merging import COMBINED, given_merged
from support.oracle import suppressed
from support.tiny_models import FamilyCase
from vlmprune.errors import VlmpruneError
from vlmprune.methods.layer_method import LayerMethod
from vlmprune.methods.needs import PIXELS, STILL_IMAGES
from vlmprune.methods.registry import get_method, make_method

DTYPE = torch.float64


def modelled(name: str) -> bool:
    """Whether the reference can follow a method.

    It takes features from a tower that ran on all patches, and caches that hold what each layer saw; methods that refuse images
    in later turns have tests of their own.
    """
    parts = make_method(name, **METHOD_PARAMETERS[name]).parts()
    inner = [part for part in parts if isinstance(part, LayerMethod)]
    trimmed = any(part.trims_cache(6) is not None or part.reads_whole_row for part in inner)
    return not trimmed and not any(PIXELS in part.needs for part in parts)


# What they hold is not given back, and the sequences crop.
NOT_CROPPED = tuple(case.name for case in FAMILY_CASES if not croppable(case))
CASES = {
    parameter.id: parameter.values
    for parameter in MATRIX
    if (not get_method(parameter.values[0]).merges or parameter.values[0] in COMBINED.keys() - MERGED_INSIDE.keys())
    and modelled(parameter.values[0])
    and not parameter.values[1].name.startswith(NOT_CROPPED)
}
IMAGES = ("A", "B", "small", "large")
VIDEOS = ("video small", "video large")

# What goes wrong today and is not tried.
AWAITED = {"positions of the cache"}

# What may be refused: who is applied while the cache is pruned, and the words of the message.
MAY_REFUSE = {
    "everything": "continue it with the method",
    "nothing": "",
    "another": "continue it with the method",
}


@cache
def models(case: FamilyCase) -> tuple[Any, Any]:
    """Return an unpatched model of a case, and its copy that is patched."""
    plain = case.build(DTYPE)
    if hasattr(plain, "set_experts_implementation"):
        # The grouped product has no double precision.
        plain.set_experts_implementation("eager")
    return plain, copy.deepcopy(plain)


class CallSequences(RuleBasedStateMachine):
    """One model, one method, one conversation with forks; every answer is compared with logits made without a cache."""

    statistics: ClassVar[Counter[str]] = Counter()

    def __init__(self) -> None:
        super().__init__()
        self.applied = "nothing"
        self.forks: list[tuple[Any, CallerSequence, bool]] = []

    # ---------------------------------------------------------------- the model and who is applied to it

    @initialize(data=st.data())
    def begin(self, data: st.DataObject) -> None:
        """Choose a model, a method, and the prompts' number of rows."""
        self.method, self.case = CASES[data.draw(st.sampled_from(list(CASES)), label="method and family")]
        self.plain, self.model = models(self.case)
        self.keep = data.draw(st.sampled_from([0.3, 0.5, few_tokens(self.method, self.case)]), label="keep")
        self.asked = data.draw(st.sampled_from([None, None, "compact", "original"]), label="positions")
        closing = default_positions(self.plain, self.method)
        self.closing = closing if self.asked is None else Positions(*[self.asked == "compact"] * 2)
        self.mrope = isinstance(self.case, QwenCase)
        self.depth = self.plain.config.get_text_config().num_hidden_layers
        self.names = IMAGES
        if STILL_IMAGES not in get_method(self.method).needs and self.case.name.startswith(("qwen", "llava-onevision")):
            # Videos of one OneVision call have equally many frames.
            self.names = IMAGES + (VIDEOS if self.mrope else VIDEOS[:1])
        self.cache: Any = None
        self.pruned = False
        self.sequence = self._empty(data.draw(st.sampled_from([1, 1, 2, 3]), label="rows"))
        self._apply("method")
        self.statistics["sequences"] += 1

    def _apply(self, what: str) -> None:
        if self.applied != "nothing":
            vlmprune.remove(self.model)
        self.applied = "nothing"
        if what == "method":
            given = METHOD_PARAMETERS[self.method]
            vlmprune.apply(self.model, self.method, keep=self.keep, positions=self.asked, **given)
        elif what == "everything":
            given = REQUIRED.get(self.method, {})
            vlmprune.apply(self.model, self.method, keep=1.0, positions=self.asked, **given)
        elif what == "another":
            vlmprune.apply(
                self.model, "uniform" if self.method != "uniform" else "random", keep=0.4, positions=self.asked
            )
        self.applied = what

    @rule(what=st.sampled_from(["nothing", "method", "everything", "another"]))
    def change_method(self, what: str) -> None:
        """Take the method away, put it back, apply it with a budget of everything, or apply another one."""
        self._apply(what)
        self._probe()

    def teardown(self) -> None:
        """Leave the shared model unpatched."""
        if self.applied != "nothing":
            vlmprune.remove(self.model)

    # ---------------------------------------------------------------- forward and generate

    @rule(data=st.data())
    def forward(self, data: st.DataObject) -> None:
        """A turn or a decode step by a plain forward."""
        self._forward(*self._draw_turn(data), data)

    @rule(data=st.data())
    def forward_text(self, data: st.DataObject) -> None:
        """A text turn or a decode step by a plain forward."""
        self._forward(*self._draw_turn(data, images=False), data)

    @precondition(lambda self: self.pruned and self.sequence.columns)
    @rule()
    def forward_with_positions_of_the_cache(self) -> None:
        """A decode step whose positions are counted by the entries that the first layer holds."""
        if "positions of the cache" in AWAITED:
            return
        entries = int(self.cache.layers[0].get_seq_length())
        ids = torch.full((self.sequence.rows, 1), 9)
        turn = self._text(ids, torch.ones_like(ids).bool())
        if bool((turn.positions <= entries).any()) or not bool(self.sequence.mask.all()):
            # Positions that lie beyond the sequence (M-RoPE counts fewer than tokens) are the caller's own choice.
            return
        whole, before = self.sequence.then(turn), copy.deepcopy(self.cache)
        positions = torch.full_like(turn.positions, entries)
        kwargs = {"input_ids": ids, "attention_mask": whole.mask.long(), "past_key_values": before}
        kwargs["position_ids"] = positions if self.mrope else positions[0]
        try:
            with torch.no_grad():
                logits = self.model(**kwargs).logits
        except VlmpruneError as error:
            self.statistics[f"positions of the cache refused: {type(error).__name__}"] += 1
            return
        self.statistics["positions of the cache accepted"] += 1
        whole = self.sequence.then(turn.seen(turn.layers, self.closing, self.sequence))
        for row in range(whole.rows):
            _, expected = row_logits(self.plain, whole, row, self.sequence.columns)
            torch.testing.assert_close(logits[row], expected, atol=1e-5, rtol=1e-5)

    def _forward(self, turn: CallerSequence, inputs: dict[str, Tensor], data: st.DataObject | None) -> None:
        whole = self.sequence.then(turn)
        kwargs = self._call_inputs(whole, inputs)
        kwargs["input_ids"] = turn.ids
        if "mm_token_type_ids" in kwargs:
            kwargs["mm_token_type_ids"] = token_types(turn.ids)
        if data is not None and bool(whole.mask.all()) and data.draw(st.booleans(), label="no mask"):
            del kwargs["attention_mask"]
        plain = bool(whole.mask.all()) and (not self.mrope or not self.sequence.columns)
        if not plain or (data is not None and data.draw(st.booleans(), label="positions given")):
            ids = turn.positions
            kwargs["position_ids"] = ids if self.mrope else ids[0]
        cache = self.cache
        if cache is None and data is not None and data.draw(st.booleans(), label="empty cache given"):
            cache = DynamicCache()
        output = self._attempt("forward", cache, lambda: self.model(**kwargs, past_key_values=cache, use_cache=True))
        if output is None:
            return
        self.cache = output.past_key_values
        start = self.sequence.columns
        self._extend(turn, inputs)
        for row in range(self.sequence.rows):
            columns, expected = row_logits(self.plain, self.sequence, row, start)
            got = output.logits[row, columns - start]
            torch.testing.assert_close(
                got, expected, atol=1e-5, rtol=1e-5, msg=lambda text, row=row: f"row {row}: {text}"
            )

    @rule(data=st.data(), mode=st.sampled_from(["greedy", "greedy", "sample", "beams", "lookup"]))
    def generate(self, data: st.DataObject, mode: str) -> None:
        """A turn by `generate`."""
        turn, inputs = self._draw_turn(data)
        whole = self.sequence.then(turn)
        if not bool(whole.mask[:, -1].all()) or (mode == "lookup" and whole.rows > 1):
            return
        steps = data.draw(st.integers(1, 4), label="new tokens")
        copies = {"sample": data.draw(st.integers(1, 2), label="sequences") if mode == "sample" else 1, "beams": 2}.get(
            mode, 1
        )
        if self.cache is not None and (mode == "lookup" or (copies > 1 and not self.sequence.columns)):
            # The host's assisted search puts the whole prompt behind a cache that is given; rows of an emptied cache stay.
            return
        earlier_images = bool(placeholders(self.plain, self.sequence.ids).any())
        if whole.rows * copies > 4 or (copies > 1 and inputs and earlier_images):
            # The host shares a call's images among copies by all placeholders of the prompt, those of earlier turns too.
            return
        kwargs = self._call_inputs(whole, inputs)
        kwargs["input_ids"] = whole.ids
        if "mm_token_type_ids" in kwargs:
            kwargs["mm_token_type_ids"] = token_types(whole.ids)
        cache = copy.deepcopy(self.cache)
        if cache is not None:
            kwargs["past_key_values"] = cache
            if self.mrope:
                kwargs["position_ids"] = whole.positions
            if copies > 1:
                cache.batch_repeat_interleave(copies)
        options: dict[str, Any] = {
            "max_new_tokens": steps,
            "return_dict_in_generate": True,
            "output_logits": mode != "beams",
        }
        options |= {
            "greedy": {"do_sample": False},
            "sample": {"do_sample": True, "num_return_sequences": copies},
            "beams": {"do_sample": False, "num_beams": 2, "num_return_sequences": 2, "output_scores": True},
            "lookup": {"do_sample": False, "prompt_lookup_num_tokens": 2},
        }[mode]
        torch.manual_seed(0)
        output = self._attempt(f"generate {mode}", cache, lambda: self.model.generate(**kwargs, **options))
        if output is None:
            return
        kept = self.cache, self.sequence, self.pruned
        self.cache = output.past_key_values
        if copies > 1:
            rows = torch.arange(whole.rows).repeat_interleave(copies)
            self.sequence, turn = self.sequence.select(rows), turn.select(rows)
        self._extend(turn, inputs, copies)
        answer = output.sequences[:, whole.columns :]
        self._extend(self._text(answer, torch.ones_like(answer).bool()), {})
        self._check_generated(output, answer, whole.columns, mode)
        self.sequence = self.sequence.cropped(whole.columns + answer.shape[1] - 1)
        if mode == "beams":
            # The rows of the returned cache follow the beams that are left, whatever order the answers have.
            self.cache, self.sequence, self.pruned = kept

    def _check_generated(self, output: Any, answer: Tensor, start: int, mode: str) -> None:
        for row in range(len(answer)):
            _, logits = row_logits(self.plain, self.sequence, row, start - 1)
            expected = logits[:-1].float()
            if mode == "beams":
                chosen = expected.log_softmax(-1).gather(1, answer[row][:, None]).mean()
                torch.testing.assert_close(output.sequences_scores[row].double(), chosen.double(), atol=1e-4, rtol=1e-4)
                continue
            got = torch.stack([step[row] for step in output.logits])
            torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)
            if mode != "sample":
                assert suppressed(expected).argmax(-1).tolist() == answer[row].tolist()

    # ---------------------------------------------------------------- the cache itself

    @precondition(lambda self: self.cache is not None)
    @rule(data=st.data())
    def crop(self, data: st.DataObject) -> None:
        """Forget the last tokens: a few, all after an image, part of an image, or everything."""
        columns = self.sequence.columns
        removed = data.draw(st.one_of(st.integers(0, min(4, columns)), st.integers(0, columns)), label="cropped")
        cache = copy.deepcopy(self.cache)
        if self._attempt("crop", None, lambda: (cache.crop(-removed), True)) is None:
            return
        self.cache, self.sequence = cache, self.sequence.cropped(columns - removed)
        if removed == columns:
            self.pruned = False
        self._probe()

    @precondition(lambda self: self.cache is not None)
    @rule(data=st.data(), through=st.sampled_from(["reorder_cache", "batch_select_indices", "batch_repeat_interleave"]))
    def move_rows(self, data: st.DataObject, through: str) -> None:
        """Reorder, select or repeat the rows of the cache by hand."""
        if not self.sequence.columns:
            # The host leaves the rows of an emptied cache as they are.
            return
        count = self.sequence.rows
        if through == "batch_repeat_interleave":
            if count > 2:
                return
            self.cache.batch_repeat_interleave(2)
            rows = torch.arange(count).repeat_interleave(2)
        else:
            wanted = st.lists(st.integers(0, count - 1), min_size=1, max_size=3)
            rows = torch.tensor(data.draw(wanted, label="rows"))
            getattr(self.cache, through)(rows)
        self.sequence = self.sequence.select(rows)
        self._probe()

    @rule()
    def fork(self) -> None:
        """Keep a deep copy to come back to."""
        if len(self.forks) < 2:
            self.forks.append((copy.deepcopy(self.cache), self.sequence, self.pruned))

    @precondition(lambda self: self.forks)
    @rule()
    def come_back(self) -> None:
        """Exchange the conversation for the oldest copy."""
        now = self.cache, self.sequence, self.pruned
        self.cache, self.sequence, self.pruned = self.forks.pop(0)
        self.forks.append(now)
        self._probe()

    @rule(data=st.data())
    def start_again(self, data: st.DataObject) -> None:
        """Begin a new conversation, without a cache or with the old one reset."""
        if self.cache is not None and data.draw(st.booleans(), label="reset"):
            self.cache.reset()
        else:
            self.cache = None
        self.pruned = False
        self.sequence = self._empty(data.draw(st.sampled_from([1, 2]), label="rows"))

    # ---------------------------------------------------------------- helpers

    def _probe(self) -> None:
        """One decode step on a copy."""
        if self.cache is None:
            return
        kept = self.cache, self.sequence, self.pruned
        self.cache = copy.deepcopy(self.cache)
        ids = torch.full((self.sequence.rows, 1), 7)
        self._forward(self._text(ids, torch.ones_like(ids).bool()), {}, None)
        self.cache, self.sequence, self.pruned = kept

    def _attempt(self, what: str, cache: Any, call: Callable[[], Any]) -> Any:
        """Return what the call returns; None if it is refused where it may be, and nothing changed by it."""
        lengths = _lengths(cache)
        self.statistics[what] += 1
        try:
            with torch.no_grad():
                return call()
        except VlmpruneError as error:
            allowed = MAY_REFUSE.get(self.applied) if self.pruned else None
            if allowed is None or not re.search(allowed, str(error)):
                raise
            event(f"refused with {self.applied} applied")
            self.statistics[f"{what} refused, {self.applied} applied: {type(error).__name__}"] += 1
            note(f"refused: {error}")
            assert _lengths(cache) == lengths, "a refused call changed the cache"
            return None

    def _empty(self, rows: int) -> CallerSequence:
        axes, size = (3 if self.mrope else 1), self.plain.get_input_embeddings().embedding_dim
        none = torch.zeros(rows, 0, dtype=torch.int64)
        return CallerSequence(
            ids=none,
            mask=none.bool(),
            positions=none.expand(axes, rows, 0),
            embeddings=torch.zeros(rows, 0, size, dtype=DTYPE),
            deepstack=(),
            layers=none,
            lowered=none.expand(self.depth, axes, rows, 0),
        )

    def _draw_turn(self, data: st.DataObject, images: bool = True) -> tuple[CallerSequence, dict[str, Tensor]]:
        """Draw prompts for all rows; return them as part of the caller's sequence, and the model inputs."""
        rows = []
        shown = images and self.sequence.columns < 300 and data.draw(st.booleans(), label="images")
        for _ in range(self.sequence.rows):
            row: list[int | str] = [data.draw(st.integers(1, 4))]
            if shown and data.draw(st.sampled_from([True, True, False])):
                for name in data.draw(st.lists(st.sampled_from(self.names), min_size=1, max_size=2)):
                    row += [name, data.draw(st.integers(1, 3))]
            rows.append(row)
        note(f"turn: {rows}")
        padding = data.draw(st.sampled_from(["left", "right"]), label="padding") if self.sequence.rows > 1 else "left"
        inputs = self.case.inputs(rows, padding, DTYPE)
        ids, mask = inputs.pop("input_ids"), inputs.pop("attention_mask").bool()
        inputs.pop("mm_token_type_ids", None)
        if not inputs:
            return self._text(ids, mask), {}
        turn_inputs = {"input_ids": ids, "attention_mask": mask.long(), **inputs}
        if self.mrope:
            turn_inputs["mm_token_type_ids"] = token_types(ids)
        given = language_model_inputs(self.plain, turn_inputs)
        positions = self.case.positions(self.plain, turn_inputs)
        positions = (positions if self.mrope else positions[None]) + self.sequence.next_positions[:, None]
        return self._turn(ids, mask, positions, given), inputs

    def _turn(self, ids: Tensor, mask: Tensor, positions: Tensor, given: dict[str, Any]) -> CallerSequence:
        visual, embeddings = placeholders(self.plain, ids), given["inputs_embeds"]
        deep = tuple(torch.zeros_like(embeddings) for _ in range(self._deepstack))
        for plane, features in zip(deep, given.get("deepstack_visual_embeds") or (), strict=False):
            plane[visual] = features
        return CallerSequence(
            ids=ids,
            mask=mask,
            positions=positions,
            embeddings=embeddings,
            deepstack=deep,
            layers=torch.full_like(ids, self.depth),
            lowered=torch.zeros(self.depth, *positions.shape, dtype=torch.int64),
        )

    @property
    def _deepstack(self) -> int:
        return len(getattr(self.plain.config.vision_config, "deepstack_visual_indexes", ()))

    def _text(self, ids: Tensor, mask: Tensor) -> CallerSequence:
        embeddings = self.plain.get_input_embeddings()(ids).detach()
        own = (mask.cumsum(1) - 1).clamp(min=0) + self.sequence.next_positions[:, None]
        return self._turn(ids, mask, own.expand(3 if self.mrope else 1, *ids.shape), {"inputs_embeds": embeddings})

    def _call_inputs(self, whole: CallerSequence, inputs: dict[str, Tensor]) -> dict[str, Any]:
        types = {"mm_token_type_ids": None} if self.mrope and inputs else {}
        return {**inputs, **types, "attention_mask": whole.mask.long()}

    def _extend(self, turn: CallerSequence, inputs: dict[str, Tensor], copies: int = 1) -> None:
        """Append a turn of which the record says what was kept."""
        if inputs and self.applied != "nothing":
            record = vlmprune.last_run(self.model)
            visual = placeholders(self.plain, turn.ids)
            seen = turn.layers.clone()
            for row in range(turn.rows):
                mine = [i for i, image in enumerate(record.images) if image.batch_index == row]
                if mine:
                    seen[row, visual[row]] = torch.cat([layers_seen(record, image, self.depth) for image in mine])
            asked = {"method": self.keep, "everything": 1.0, "another": 0.4}[self.applied]
            fewer = any(image.total > asked if isinstance(asked, int) else asked < 1 for image in record.images)
            assert bool((seen < self.depth).any()) == fewer, "something was pruned that should not be, or nothing"
            if self.applied == "method" and get_method(self.method).merges:
                turn = self._merged(turn, inputs, record)
            self.pruned = self.pruned or fewer
            turn = turn.seen(seen, self.closing, self.sequence)
        else:
            turn = turn.seen(turn.layers, self.closing, self.sequence)
        self.sequence = self.sequence.then(turn)

    def _merged(self, turn: CallerSequence, inputs: dict[str, Tensor], record: Any) -> CallerSequence:
        visual = placeholders(self.plain, turn.ids)
        given = {
            "inputs_embeds": turn.embeddings,
            "deepstack_visual_embeds": [plane[visual] for plane in turn.deepstack],
        }
        merged = given_merged(given, {"input_ids": turn.ids}, record, self.plain.config.image_token_id)
        return self._turn(turn.ids, turn.mask, turn.positions, merged)


def _lengths(cache: Any) -> list[int]:
    return [] if cache is None else [int(layer.get_seq_length()) for layer in cache.layers]
