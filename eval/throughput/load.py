"""Load on a server: so many clients at once, each of which asks again as soon as it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

import numpy as np

from .client import Answer, ask, open_client


@dataclass(frozen=True)
class Level:
    """What a server did under one load.

    Attributes:
        concurrency: clients at once.
        requests: requests answered.
        seconds: from the first request to the end of the last answer.
        requests_per_second: over these seconds.
        new_tokens_per_second: likewise, None where the server does not count tokens.
        ttft: seconds from a request to its first text, `median` and `p95` over requests.
        inter_token: seconds between pieces of text, `median` and `p95` over the pieces of all requests; None where every answer
            is one piece.
        prompt_tokens: mean of what the server counts.
        new_tokens: likewise.
    """

    concurrency: int
    requests: int
    seconds: float
    requests_per_second: float
    new_tokens_per_second: float | None
    ttft: dict[str, float]
    inter_token: dict[str, float] | None
    prompt_tokens: float | None
    new_tokens: float | None


def run_level(
    address: str, requests: Sequence[Mapping[str, Any]], concurrency: int, timeout_seconds: float = 600.0
) -> Level:
    """Send all requests from `concurrency` clients and wait for the answers.

    Args:
        address: of the server, without `/v1`.
        requests: arguments of `chat.completions.create`, in the order in which they are sent.
        concurrency: clients at once.
        timeout_seconds: when a request is given up.

    Raises:
        ServerError: a request failed; those under way are given up.
    """
    answers = asyncio.run(_send(address, requests, concurrency, timeout_seconds))
    return summarised(answers, concurrency)


async def _send(
    address: str, requests: Sequence[Mapping[str, Any]], concurrency: int, timeout_seconds: float
) -> list[Answer]:
    waiting, answers = iter(requests), list[Answer]()
    async with open_client(address, timeout_seconds) as client:

        async def one_client(mine: Iterator[Mapping[str, Any]]) -> None:
            for request in mine:
                answers.append(await ask(client, request))

        clients = [asyncio.create_task(one_client(waiting)) for _ in range(concurrency)]
        try:
            await asyncio.gather(*clients)
        finally:
            for task in clients:
                task.cancel()
            await asyncio.gather(*clients, return_exceptions=True)
    return answers


def summarised(answers: Sequence[Answer], concurrency: int) -> Level:
    """The figures of these answers."""
    seconds = max(answer.ended for answer in answers) - min(answer.sent for answer in answers)
    gaps = [gap for answer in answers for gap in answer.gaps]
    prompt = [answer.prompt_tokens for answer in answers if answer.prompt_tokens is not None]
    new = [answer.new_tokens for answer in answers if answer.new_tokens is not None]
    return Level(
        concurrency=concurrency,
        requests=len(answers),
        seconds=seconds,
        requests_per_second=len(answers) / seconds,
        new_tokens_per_second=sum(new) / seconds if new else None,
        ttft=_spread([answer.first_token for answer in answers]),
        inter_token=_spread(gaps) if gaps else None,
        prompt_tokens=fmean(prompt) if prompt else None,
        new_tokens=fmean(new) if new else None,
    )


def _spread(values: Sequence[float]) -> dict[str, float]:
    return {"median": float(np.median(values)), "p95": float(np.percentile(values, 95))}
