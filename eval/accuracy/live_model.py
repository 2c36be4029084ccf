"""An lmms-eval model around a live Hugging Face model, pruned or not.

Differences from lmms-eval's own wrappers: `clean` leaves the model alone (one model serves many runs), errors in generation
are raised and never scored as empty answers, batches of any size, and the token counts of every request are recorded.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from transformers import PreTrainedModel

from vlmprune.errors import UnsupportedCallError
from vlmprune.eval.models.lower_resolution import LowerResolution

from .answer_log import AnswerLog, Key
from .generation import cut_at, end_tokens, generation_settings
from .questions import Question, Turn, batches_of, generation_question, scoring_question, user_turn
from .request_records import RequestRecord, request_records
from .videos import MOST_FRAMES, processor_arguments


class LiveModel(lmms):
    """A model and its processor as lmms-eval wants them.

    Attributes:
        pruned: whether `vlmprune.apply` was called on the model.
        resolution: what makes pictures smaller before they are encoded, if anything.
        video_frames: most frames read of a video file.
        on_progress: called with the number of requests answered after every batch.
        records: what was counted since the last `reset`.
        model_seconds: time spent inside the model since then.
    """

    is_simple = False

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        batch_size: int = 1,
        pruned: bool = False,
        resolution: LowerResolution | None = None,
        video_frames: int = MOST_FRAMES,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.batch_size = int(batch_size)
        self.pruned = pruned
        self.resolution = resolution
        self.video_frames = video_frames
        self.on_progress = on_progress
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def reset(
        self,
        pruned: bool | None = None,
        resolution: LowerResolution | None = None,
        log: AnswerLog | None = None,
    ) -> None:
        """Forget the records; `pruned` as in the constructor, and with it `resolution`; `log` stores answers as they come."""
        self.log = log
        self.records: list[RequestRecord] = []
        self.model_seconds = 0.0
        if pruned is not None:
            self.pruned, self.resolution = pruned, resolution

    def clean(self) -> None:
        """Keep the model: the caller owns it."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer every request; raises whatever the model raises."""
        return self._answered("generate", requests, generation_question, self._generate)

    def _answered(
        self,
        kind: str,
        requests: list[Instance],
        make: Callable[[int, Instance, Any, int], Question],
        answer: Callable[[list[Question]], Sequence[Any]],
    ) -> list[Any]:
        """What `answer` gives for every request, batch by batch; answers that the log holds are taken from it."""
        answers: list[Any] = [None] * len(requests)
        keys: dict[int, Key] = {}

        def fresh() -> Iterator[Question]:
            for place, request in enumerate(requests):
                stored = None
                if self.log is not None and len(request.args) == 6:
                    keys[place] = (kind, place, str(request.args[4]), int(request.args[3]))
                    stored = self.log.find(keys[place])
                if stored is None:
                    yield make(place, request, self.task_dict, self.video_frames)
                else:
                    answers[place] = stored[0]
                    self.records += [stored[1]] if stored[1] is not None else []
                    self._progress(1)

        for batch in batches_of(fresh(), self.batch_size):
            before = len(self.records)
            found = answer(batch)
            records = iter(self.records[before:])
            lines = []
            for question, one in zip(batch, found, strict=True):
                answers[question.position] = one
                record = next(records) if question.counted else None
                if question.position in keys:
                    lines.append((keys[question.position], one, record))
            if self.log is not None:
                self.log.add(lines)
            self._progress(len(batch))
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise UnsupportedCallError(
            "Tasks of several rounds are not supported; allowed: generate_until, multiple_choice."
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean negative log-likelihood of each continuation (lmms-eval takes the least) and whether it is greedy."""
        results = self._answered("score", requests, scoring_question, self._score)
        # lmms-eval 0.7 turns a bare (number, bool) into a string; what is wrapped it hands on as it is.
        return [GenerationResult((float(loss), bool(greedy))) for loss, greedy in results]

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self._model

    def encode_turns(self, turns: Sequence[tuple[str, Sequence[Any] | None]]) -> dict[str, Any]:
        """The processor's output for a batch of user turns (text, pictures and videos), on the model's device."""
        batch = [
            Question(i, "", 0, user_turn(text, visuals, self.video_frames), False)
            for i, (text, visuals) in enumerate(turns)
        ]
        return self._encode(self._prompts(batch), batch)

    @torch.inference_mode()
    def reply(self, turns: Sequence[Turn], new_tokens: int) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        """Greedy token ids of every turn (see `user_turn`), and log-probabilities [turns, vocabulary] of the first token."""
        batch = [Question(i, "", i, turn, True) for i, turn in enumerate(turns)]
        inputs = self._encode(self._prompts(batch), batch)
        settings = generation_settings({"max_new_tokens": new_tokens})
        output = self._model.generate(
            **inputs, **settings, pad_token_id=self._pad(), return_dict_in_generate=True, output_logits=True
        )
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = [self._length(row) for row in tokens]
        self.records += self._recorded(batch, inputs, lengths)
        first = output.logits[0].float().log_softmax(-1)
        return [tuple(row[:length]) for row, length in zip(tokens, lengths, strict=True)], first

    def _pad(self) -> int:
        pad: int | None = self.tokenizer.pad_token_id
        return pad if pad is not None else self.tokenizer.eos_token_id

    def _length(self, tokens: Sequence[int]) -> int:
        """Tokens up to the one that ends the answer, itself included."""
        ends = end_tokens(self._model)
        return next((i + 1 for i, token in enumerate(tokens) if token in ends), len(tokens))

    def _progress(self, count: int) -> None:
        if self.on_progress is not None:
            self.on_progress(count)

    def _encode(self, texts: list[str], batch: Sequence[Question]) -> dict[str, Any]:
        images = [image for question in batch for image in question.turn.images]
        videos = [video for question in batch for video in question.turn.videos]
        smaller: dict[str, Any] = {}
        if self.resolution is not None:
            if videos:
                raise UnsupportedCallError("'lower_resolution' makes pictures smaller, not videos; allowed: pictures.")
            images, smaller = self.resolution.shrink(images)
        bos = getattr(self.tokenizer, "bos_token", None)
        extra = {"add_special_tokens": False} if bos and all(text.startswith(bos) for text in texts) else {}
        inputs = self.processor(
            text=texts,
            images=images or None,
            padding=True,
            padding_side="left",
            return_tensors="pt",
            **extra,
            **smaller,
            **processor_arguments(videos),
        )
        return dict(inputs.to(self._model.device, self._model.dtype))

    def _prompts(self, batch: Sequence[Question]) -> list[str]:
        return [
            self.processor.apply_chat_template(question.turn.messages, add_generation_prompt=True, tokenize=False)
            for question in batch
        ]

    def _recorded(
        self, batch: Sequence[Question], inputs: dict[str, Any], lengths: list[int], beams: int = 1
    ) -> list[RequestRecord]:
        records = request_records(self._model, self.pruned, batch, inputs, lengths, rows_per_question=beams)
        if self.resolution is None:
            return records
        whole = [sum(self.resolution.whole_tokens(question.turn.images)) for question in batch if question.counted]
        return [replace(record, visual_before=tokens) for record, tokens in zip(records, whole, strict=True)]

    @torch.inference_mode()
    def _generate(self, batch: list[Question]) -> list[str]:
        inputs = self._encode(self._prompts(batch), batch)
        settings = generation_settings(batch[0].settings)
        start = time.perf_counter()
        output = self._model.generate(**inputs, **settings, pad_token_id=self._pad())
        tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        self.model_seconds += time.perf_counter() - start
        lengths = [self._length(row) for row in tokens]
        self.records += self._recorded(batch, inputs, lengths, settings["num_beams"])
        answers = [
            self.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(tokens, lengths, strict=True)
        ]
        return [cut_at(answer, question.settings.get("until")) for answer, question in zip(answers, batch, strict=True)]

    @torch.inference_mode()
    def _score(self, batch: list[Question]) -> list[tuple[float, bool]]:
        prompts = self._prompts(batch)
        alone = self._encode(prompts, batch)
        inputs = self._encode(
            [prompt + question.continuation for prompt, question in zip(prompts, batch, strict=True)], batch
        )
        lengths = []
        for row in range(len(batch)):
            prompt = alone["input_ids"][row][alone["attention_mask"][row].bool()]
            whole = inputs["input_ids"][row][inputs["attention_mask"][row].bool()]
            shared = min(len(prompt), len(whole))
            same = (prompt[:shared] == whole[:shared]).long().cumprod(0).sum().item()
            lengths.append(len(whole) - int(same))
            if lengths[-1] == 0:
                raise UnsupportedCallError(f"The continuation {batch[row].continuation!r} has no tokens.")
        longest = max(lengths)
        start = time.perf_counter()
        logits = self._model(**inputs, use_cache=False, logits_to_keep=longest + 1).logits[:, -longest - 1 : -1]
        log_probabilities = logits.float().log_softmax(-1)
        targets = inputs["input_ids"][:, -longest:]
        chosen = log_probabilities.gather(-1, targets[..., None])[..., 0].tolist()
        greedy = (log_probabilities.argmax(-1) == targets).tolist()
        self.model_seconds += time.perf_counter() - start
        self.records += self._recorded(batch, inputs, [0] * len(batch))
        return [
            (-sum(row[-n:]) / n, all(matches[-n:])) for row, matches, n in zip(chosen, greedy, lengths, strict=True)
        ]
