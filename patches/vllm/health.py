"""What was pruned, for operators: a line in the log of the engine, and counters among the metrics of the server."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

SECONDS = 30.0
"""Between two lines of the log at least."""


class PruneLog:
    """Writes how many visual tokens images had and how many entered the language model."""

    def __init__(self, logger: Any, what: str) -> None:
        self.logger = logger
        self.what = what
        self.images = self.before = self.after = 0
        self.written = float("-inf")

    def count(self, before: list[int], after: list[int]) -> None:
        """Add the images of one call of the vision tower."""
        self.images += len(before)
        self.before += sum(before)
        self.after += sum(after)
        now = time.monotonic()
        if now - self.written >= SECONDS:
            self.written = now
            self.logger.info(
                "vlmprune: %s; %d images encoded so far, %d visual tokens before and %d after",
                *(self.what, self.images, self.before, self.after),
            )


@cache
def counters() -> tuple[Any, Any, Any]:
    """Return the counters of images, and of their visual tokens before and after, that the server's `/metrics` shows."""
    from prometheus_client import Counter

    return (
        Counter("vlmprune_images_total", "Images in prompts."),
        Counter("vlmprune_visual_tokens_before_total", "Visual tokens that the images in prompts have."),
        Counter("vlmprune_visual_tokens_after_total", "Visual tokens of images that enter the language model."),
    )


def count_images(before: list[int], after: list[int]) -> None:
    """Add the images of one prompt to the counters."""
    images, tokens_before, tokens_after = counters()
    images.inc(len(before))
    tokens_before.inc(sum(before))
    tokens_after.inc(sum(after))
