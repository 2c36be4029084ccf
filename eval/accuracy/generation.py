"""How a task asks for its answers: arguments of `generate`, and where an answer ends."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedModel

MAX_NEW_TOKENS = 256


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
