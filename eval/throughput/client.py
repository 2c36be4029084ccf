"""One streamed chat request to an OpenAI-compatible server, with the times of what comes back."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import openai

from .server_process import ServerError


@dataclass(frozen=True)
class Answer:
    """Times of one answer, in seconds of the clock `time.perf_counter`.

    Attributes:
        sent: when the request was sent.
        pieces: when each piece of text arrived; of most servers one a token.
        ended: when the answer was complete.
        prompt_tokens: as the server counts them, None where it does not say.
        new_tokens: likewise.
    """

    sent: float
    pieces: tuple[float, ...]
    ended: float
    prompt_tokens: int | None
    new_tokens: int | None

    @property
    def first_token(self) -> float:
        """Seconds from the request to the first piece of text (TTFT)."""
        return self.pieces[0] - self.sent

    @property
    def gaps(self) -> list[float]:
        """Seconds between pieces of text (inter-token latency)."""
        return [after - before for before, after in pairwise(self.pieces)]


def open_client(address: str, seconds: float) -> openai.AsyncOpenAI:
    """A client that asks once; `address` without `/v1`, `seconds` until a request is given up."""
    # A key is asked for by the library, and by no server without accounts; OPENAI_API_KEY would otherwise be sent.
    return openai.AsyncOpenAI(base_url=f"{address}/v1", api_key="none", max_retries=0, timeout=seconds)


async def ask(client: openai.AsyncOpenAI, request: Mapping[str, Any]) -> Answer:
    """Send a request and read its answer to the end.

    Args:
        client: of `open_client`.
        request: arguments of `chat.completions.create`.

    Raises:
        ServerError: the server cannot be reached, answers with an error or without text, or breaks off.
    """
    sent, pieces, usage, finished = time.perf_counter(), [], None, None
    try:
        stream = await client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True})
        async for chunk in stream:
            usage = chunk.usage or usage
            for choice in chunk.choices:
                if choice.delta.content or getattr(choice.delta, "reasoning_content", None):
                    pieces.append(time.perf_counter())
                finished = choice.finish_reason or finished
    except (openai.OpenAIError, ValueError) as error:
        raise ServerError(_message(error)) from error
    if finished is None:
        raise ServerError(f"the answer broke off after {len(pieces)} pieces of text")
    if not pieces:
        raise ServerError(f"an answer without text, ended by {finished!r}; nothing can be timed")
    counted = (usage.prompt_tokens, usage.completion_tokens) if usage is not None else (None, None)
    return Answer(sent, tuple(pieces), time.perf_counter(), *counted)


def _message(error: Exception) -> str:
    if isinstance(error, openai.APIStatusError):
        return f"status {error.status_code}: {error.message}"
    if isinstance(error, openai.APITimeoutError):
        return "no answer in time"
    if isinstance(error, openai.APIConnectionError):
        return f"the connection failed: {error.__cause__ or error.message}"
    if isinstance(error, openai.APIError):
        return f"an error in the stream: {error.body or error.message}"
    return f"an answer that is not understood: {error}"
