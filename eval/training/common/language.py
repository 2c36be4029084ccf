"""The language model: its configuration, and a training layout in which many questions share one picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from .questions import ask_turns, plural
from .scenes import SHAPES, Scene
from .tokenizer import BOS, EOS, PAD

WIDTH = 128
SLOT = 19
"""Tokens of one question with its answer, padding included."""
IGNORE = -100


def language_config(tokenizer: PreTrainedTokenizerFast) -> LlamaConfig:
    """Six layers of width 128 with tied embeddings."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.05,
        rope_parameters={"rope_type": "default", "rope_theta": 1e5},
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=tokenizer.convert_tokens_to_ids(EOS),
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
    )


@torch.no_grad()
def prepare(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast) -> None:
    """Start with plurals that resemble their singular."""
    words = model.get_input_embeddings().weight
    for shape in SHAPES:
        one, many = tokenizer.convert_tokens_to_ids([shape, plural(shape)])
        words[many] += words[one]


class Prompts:
    """Turns questions into token ids laid out in slots of equal length."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        self.tokenizer = tokenizer
        self.prefix = tokenizer(f"{BOS}USER:", add_special_tokens=False).input_ids
        self._ids = lru_cache(maxsize=1 << 16)(self._encode)

    def _encode(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False).input_ids)

    def slot(self, question: str, answer: str) -> tuple[list[int], list[int]]:
        """Ids and labels of one slot; a label stands at the position that predicts it, all others are `IGNORE`."""
        asked, said = self._ids(f"{question} ASSISTANT:"), self._ids(f"{answer}{EOS}")
        ids = [*asked, *said]
        if len(ids) > SLOT:
            raise ValueError(f"{question!r} with {answer!r} takes {len(ids)} tokens, a slot has {SLOT}")
        labels = [IGNORE] * (len(asked) - 1) + [*said, IGNORE]
        rest = SLOT - len(ids)
        return ids + [self.tokenizer.pad_token_id] * rest, labels + [IGNORE] * rest

    def ask(
        self, scenes: Sequence[Scene], turns: Sequence[tuple[str, int]], rng: np.random.Generator
    ) -> tuple[Tensor, Tensor, list[list[str]]]:
        """Questions about every scene: ids and labels `[batch, slots, SLOT]`, and the task of each; empty without `turns`."""
        asked = [ask_turns(scene, turns, rng) for scene in scenes] if turns else []
        slots = [[self.slot(question.text, question.answer) for question in questions] for questions in asked]
        ids, labels = (torch.tensor([[slot[part] for slot in row] for row in slots]) for part in (0, 1))
        return ids, labels, [[question.task for question in questions] for questions in asked]


def slot_mask(start: int, slots: int) -> Tensor:
    """Additive mask `[1, 1, length, length]` of slots behind `start` tokens, of which each sees these and itself."""
    owner = torch.cat([torch.full((start,), -1), torch.arange(slots).repeat_interleave(SLOT)])
    order = torch.arange(len(owner))
    seen = (order[None, :] <= order[:, None]) & ((owner[None, :] == -1) | (owner[None, :] == owner[:, None]))
    return torch.zeros(seen.shape).masked_fill(~seen, torch.finfo(torch.float32).min)[None, None]


@lru_cache(maxsize=4)
def slot_layout(prefix: int, slots: int) -> tuple[Tensor, Tensor]:
    """`slot_mask`, and position ids `[1, length]` that every slot would have as the only question of the conversation."""
    position = torch.cat([torch.arange(prefix), prefix + torch.arange(SLOT).repeat(slots)])
    return slot_mask(prefix, slots), position[None]


EARLY = 3
"""How many tokens before an answer stands the question's last word (`circle ? ASSISTANT :`)."""


def early_labels(labels: Tensor) -> Tensor:
    """Labels with the answer's first token also at the question's last word and the two tokens after it.

    To answer there is a shorter way than to answer at the end of the prompt: the word itself finds what it names.
    """
    place = (labels != IGNORE).int().argmax(-1, keepdim=True)
    first = labels.gather(-1, place)
    early = labels.clone()
    for back in range(1, EARLY + 1):
        early.scatter_(-1, place - back, first)
    return early


@dataclass
class Answers:
    """What `answer` gives: loss over answer tokens, loss of answering early, which slots are right, hidden states."""

    loss: Tensor
    early: Tensor
    right: Tensor
    hidden: tuple[Tensor, ...]
    position: Tensor
    start: int


def grade(
    head: Callable[[Tensor], Tensor], hidden: Tensor, labels: Tensor, early: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss over answer tokens, loss of answering early (0 unless asked for), and which slots are right `[batch, slots]`.

    `hidden` is `[batch, slots * SLOT, width]`, `labels` `[batch, slots, SLOT]`; `head` makes logits.
    """
    flat = labels.flatten(1)
    wanted = flat != IGNORE
    logits, target = head(hidden[wanted]), flat[wanted]
    right = torch.ones_like(wanted)
    right[wanted] = logits.argmax(-1) == target
    sooner_loss = torch.zeros(())
    if early:
        sooner = early_labels(labels).flatten(1)
        sooner[wanted] = IGNORE
        asked = sooner != IGNORE
        sooner_loss = F.cross_entropy(head(hidden[asked]), sooner[asked])
    return F.cross_entropy(logits, target), sooner_loss, right.view(labels.shape).all(-1)


def answer(
    model: LlamaForCausalLM, prefix_ids: list[int], visual: Tensor, ids: Tensor, labels: Tensor, early: bool = False
) -> Answers:
    """Answer all questions about a batch of pictures.

    `visual` is (batch, patches, width); `ids` and `labels` are (batch, slots, `SLOT`). With `early` the loss of
    answering at the end of the question already (`early_labels`) and the hidden states of all layers come too.
    """
    batch, slots, _ = ids.shape
    embed = model.get_input_embeddings()
    prefix = embed(torch.tensor(prefix_ids)).expand(batch, -1, -1)
    embeds = torch.cat([prefix, visual, embed(ids.flatten(1))], dim=1)
    start = prefix.shape[1] + visual.shape[1]
    mask, position = slot_layout(start, slots)
    output = model.model(
        inputs_embeds=embeds, attention_mask=mask, position_ids=position, use_cache=False, output_hidden_states=early
    )
    graded = grade(model.lm_head, output.last_hidden_state[:, start:], labels, early)
    return Answers(*graded, output.hidden_states or (), position, start)
