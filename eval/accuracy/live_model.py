"""An lmms-eval model around a live Hugging Face model, pruned or not.

Only this module and `accuracy` import lmms-eval. Differences from lmms-eval's own wrappers: `clean` leaves the
model alone (one model serves many runs), errors in generation are raised and never scored as empty answers, batches
of any size, and the token counts of every request are recorded.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from lmms_eval.api.instance import GenerationResult, Instance
from lmms_eval.api.model import lmms
from PIL import Image
from transformers import PreTrainedModel

import vlmprune
from vlmprune.errors import UnsupportedCallError
from vlmprune.eval.speed.flops import VisionWork, vision_cost
from vlmprune.record import RunRecord

MAX_NEW_TOKENS = 256


@dataclass(frozen=True)
class RequestRecord:
    """Token counts of one request: visual ones before pruning and by layer of the LLM, and the tower's work.

    `images`: visual tokens of each image before and after the input of the language model; empty for the unpruned model.
    """

    task: str
    doc_id: int
    visual_before: int
    visual_per_layer: tuple[int, ...]
    text_tokens: int
    new_tokens: int
    work: VisionWork
    images: tuple[tuple[int, int], ...] = ()


@dataclass
class _Question:
    """One request as a conversation: `messages` with placeholders, `images` in order."""

    position: int
    task: str
    doc_id: int
    messages: list[dict[str, Any]]
    images: list[Image.Image]
    counted: bool
    continuation: str = ""
    settings: dict[str, Any] = field(default_factory=dict)


class LiveModel(lmms):
    """`model` and `processor` as lmms-eval wants them; `pruned` says whether `vlmprune.apply` was called on
    the model.

    `on_progress` is called with the number of requests answered after every batch. `records` holds what was
    counted since the last `reset`; `model_seconds` the time spent inside the model.
    """

    is_simple = False

    def __init__(
        self,
        model: PreTrainedModel,
        processor: Any,
        *,
        batch_size: int = 1,
        pruned: bool = False,
        on_progress: Callable[[int], None] | None = None,
    ) -> None:
        super().__init__()
        self._model = model
        self.processor = processor
        self.tokenizer = getattr(processor, "tokenizer", processor)
        self.batch_size = int(batch_size)
        self.pruned = pruned
        self.on_progress = on_progress
        self.reset()

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self._model.device

    def reset(self, pruned: bool | None = None) -> None:
        """Forget the records; `pruned` as in the constructor."""
        self.records: list[RequestRecord] = []
        self.model_seconds = 0.0
        if pruned is not None:
            self.pruned = pruned

    def clean(self) -> None:
        """Keep the model: the caller owns it."""

    def generate_until(self, requests: list[Instance]) -> list[str]:
        """Answer every request; raises whatever the model raises."""
        answers = [""] * len(requests)
        questions = (self._generation(i, request) for i, request in enumerate(requests))
        for batch in self._batches(questions):
            for question, answer in zip(batch, self._generate(batch), strict=True):
                answers[question.position] = answer
            self._progress(len(batch))
        return answers

    def generate_until_multi_round(self, requests: list[Instance]) -> list[str]:
        """Not supported."""
        raise UnsupportedCallError(
            "Tasks of several rounds are not supported; allowed: generate_until, multiple_choice."
        )

    def loglikelihood(self, requests: list[Instance]) -> list[GenerationResult]:
        """Mean negative log-likelihood of each continuation (lmms-eval takes the least) and whether it is greedy."""
        results: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        questions = (self._scoring(i, request) for i, request in enumerate(requests))
        for batch in self._batches(questions):
            for question, result in zip(batch, self._score(batch), strict=True):
                results[question.position] = result
            self._progress(len(batch))
        # lmms-eval 0.7 turns a bare (number, bool) into a string; what is wrapped it hands on as it is.
        return [GenerationResult(result) for result in results]

    def encode_turn(self, text: str, visuals: Sequence[Any] | None) -> dict[str, Any]:
        """The processor's output for one user turn, on the model's device."""
        messages, images = user_turn(text, visuals)
        question = _Question(0, "", 0, messages, images, False)
        return self._encode(self._prompts([question]), [question])

    @torch.inference_mode()
    def reply(
        self, turns: Sequence[tuple[list[dict[str, Any]], list[Image.Image]]], new_tokens: int
    ) -> tuple[list[tuple[int, ...]], torch.Tensor]:
        """Greedy token ids of every turn (see `user_turn`), and log-probabilities [turns, vocabulary] of the first token."""
        batch = [_Question(i, "", i, messages, images, True) for i, (messages, images) in enumerate(turns)]
        inputs = self._encode(self._prompts(batch), batch)
        settings = generation_settings({"max_new_tokens": new_tokens})
        output = self._model.generate(
            **inputs, **settings, pad_token_id=self._pad(), return_dict_in_generate=True, output_logits=True
        )
        tokens = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
        lengths = [self._length(row) for row in tokens]
        self._record(batch, inputs, lengths)
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

    def _generation(self, position: int, request: Instance) -> _Question:
        first, second, third, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        if callable(second):
            messages, images = from_lmms_messages(second(doc))
            settings = third
        else:
            messages, images = user_turn(first, third(doc))
            settings = second
        counted = not request.metadata.get("__padding_only__", False)
        return _Question(position, task, doc_id, messages, images, counted, settings=dict(settings))

    def _scoring(self, position: int, request: Instance) -> _Question:
        if len(request.args) != 6:
            raise UnsupportedCallError("Log-likelihood without a document (acc_mutual_info) is not supported.")
        context, continuation, to_visual, doc_id, task, split = request.args
        doc = self.task_dict[task][split][doc_id]
        messages, images = user_turn(context, to_visual(doc))
        counted = not request.metadata.get("__padding_only__", False)
        text = continuation(doc) if callable(continuation) else continuation
        return _Question(position, task, doc_id, messages, images, counted, continuation=str(text))

    def _batches(self, questions: Iterator[_Question]) -> Iterator[list[_Question]]:
        """Batches of neighbouring questions whose generation settings agree."""
        batch: list[_Question] = []
        for question in questions:
            if batch and (len(batch) == self.batch_size or _key(question) != _key(batch[0])):
                yield batch
                batch = []
            batch.append(question)
        if batch:
            yield batch

    def _encode(self, texts: list[str], batch: Sequence[_Question]) -> dict[str, Any]:
        images = [image for question in batch for image in question.images]
        bos = getattr(self.tokenizer, "bos_token", None)
        extra = {"add_special_tokens": False} if bos and all(text.startswith(bos) for text in texts) else {}
        inputs = self.processor(
            text=texts, images=images or None, padding=True, padding_side="left", return_tensors="pt", **extra
        )
        return dict(inputs.to(self._model.device, self._model.dtype))

    def _prompts(self, batch: Sequence[_Question]) -> list[str]:
        return [
            self.processor.apply_chat_template(question.messages, add_generation_prompt=True, tokenize=False)
            for question in batch
        ]

    @torch.inference_mode()
    def _generate(self, batch: list[_Question]) -> list[str]:
        inputs = self._encode(self._prompts(batch), batch)
        settings = generation_settings(batch[0].settings)
        start = time.perf_counter()
        output = self._model.generate(**inputs, **settings, pad_token_id=self._pad())
        tokens = output[:, inputs["input_ids"].shape[1] :].tolist()
        self.model_seconds += time.perf_counter() - start
        lengths = [self._length(row) for row in tokens]
        self._record(batch, inputs, lengths, rows_per_question=settings["num_beams"])
        answers = [
            self.tokenizer.decode(row[:n], skip_special_tokens=True) for row, n in zip(tokens, lengths, strict=True)
        ]
        return [cut_at(answer, question.settings.get("until")) for answer, question in zip(answers, batch, strict=True)]

    @torch.inference_mode()
    def _score(self, batch: list[_Question]) -> list[tuple[float, bool]]:
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
        self._record(batch, inputs, [0] * len(batch))
        return [
            (-sum(row[-n:]) / n, all(matches[-n:])) for row, matches, n in zip(chosen, greedy, lengths, strict=True)
        ]

    def _record(
        self, batch: Sequence[_Question], inputs: dict[str, Any], new_tokens: Sequence[int], rows_per_question: int = 1
    ) -> None:
        config = self._model.config
        is_visual = inputs["input_ids"] == config.image_token_id
        before = is_visual.sum(-1).tolist()
        if self.pruned:
            run = vlmprune.last_run(self._model)
            layers = [tuple(row) for row in run.visual_tokens_per_layer[::rows_per_question]]
            text = list(run.text_tokens[::rows_per_question])
            images = entering_images(run, inputs["input_ids"].shape[0], rows_per_question)
        else:
            images = [()] * len(batch)
            depth = config.get_text_config().num_hidden_layers
            layers = [(count,) * depth for count in before]
            text = (inputs["attention_mask"].bool() & ~is_visual).sum(-1).tolist()
        works = vision_cost(config).work(config, inputs, [len(question.images) for question in batch])
        for i, question in enumerate(batch):
            if question.counted:
                self.records.append(
                    RequestRecord(
                        question.task,
                        question.doc_id,
                        before[i],
                        layers[i],
                        text[i],
                        new_tokens[i],
                        works[i],
                        images[i],
                    )
                )


def entering_images(run: RunRecord, rows: int, expansion: int = 1) -> list[tuple[tuple[int, int], ...]]:
    """Visual tokens of every image of `rows` prompts before and after the input of the language model.

    `expansion` is the number of beams that each prompt was repeated for.
    """
    kept = run.kept_by_stage[0][1] if run.kept_by_stage else run.kept_per_image
    found: list[list[tuple[int, int]]] = [[] for _ in range(rows)]
    for row, total, tokens in zip(run.image_rows, run.image_totals, kept, strict=True):
        if row % expansion == 0:
            found[row // expansion].append((total, tokens if isinstance(tokens, int) else len(tokens)))
    return [tuple(images) for images in found]


def _key(question: _Question) -> str:
    return json.dumps(question.settings, sort_keys=True, default=str)


def generation_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Arguments of `generate` from a task's `generation_kwargs`; greedy unless the task asks for sampling."""
    temperature = float(settings.get("temperature") or 0)
    sampling = bool(settings.get("do_sample", temperature > 0)) and temperature > 0
    chosen: dict[str, Any] = {
        "max_new_tokens": int(settings.get("max_new_tokens") or settings.get("max_gen_toks") or MAX_NEW_TOKENS),
        "num_beams": int(settings.get("num_beams") or 1),
        "do_sample": sampling,
        "temperature": temperature if sampling else None,
        "top_p": settings.get("top_p") if sampling else None,
        "top_k": settings.get("top_k") if sampling else None,
    }
    return chosen


def end_tokens(model: PreTrainedModel) -> set[int]:
    """Ids that end a generation."""
    ends = model.generation_config.eos_token_id
    return set(ends) if isinstance(ends, (list, tuple)) else {ends}


def cut_at(answer: str, until: str | Sequence[str] | None) -> str:
    """`answer` up to the first of the strings that end it."""
    for stop in [until] if isinstance(until, str) else until or []:
        if stop:
            answer = answer.split(stop)[0]
    return answer


def user_turn(text: str, visuals: Sequence[Any] | None) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """A conversation of one user turn, pictures before the text."""
    images = [to_image(visual) for visual in visuals or []]
    content: list[dict[str, Any]] = [{"type": "image"} for _ in images]
    content.append({"type": "text", "text": text})
    return [{"role": "user", "content": content}], images


def from_lmms_messages(messages: Sequence[dict[str, Any]]) -> tuple[list[dict[str, Any]], list[Image.Image]]:
    """lmms-eval's chat messages as Hugging Face messages with placeholders, and their pictures in order."""
    result, images = [], []
    for message in messages:
        content: list[dict[str, Any]] = []
        for part in message["content"]:
            if part["type"] == "text":
                content.append({"type": "text", "text": part["text"]})
            elif part["type"] == "image":
                content.append({"type": "image"})
                images.append(to_image(part["url"]))
            else:
                raise UnsupportedCallError(f"Content of type {part['type']!r} is not supported; allowed: text, image.")
        result.append({"role": message["role"], "content": content})
    return result, images


def to_image(visual: Any) -> Image.Image:
    """A picture, or the path of one, in RGB."""
    if isinstance(visual, str):
        visual = Image.open(visual)
    if not isinstance(visual, Image.Image):
        raise UnsupportedCallError(
            f"A visual of type {type(visual).__name__!r} is not supported; allowed: picture or path."
        )
    return visual.convert("RGB")
