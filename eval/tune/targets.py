"""What a tuned model has to meet."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from vlmprune.errors import ParameterError

Kind = Literal["same_answers", "kl", "accuracy_drop", "kv_share", "ttft_speedup"]
QUALITY: tuple[Kind, ...] = ("same_answers", "kl", "accuracy_drop")
COST: tuple[Kind, ...] = ("kv_share", "ttft_speedup")
_ALLOWED = {
    "same_answers": (0.0, 1.0, "a share of items from above 0 to 1"),
    "kl": (0.0, float("inf"), "nats above 0"),
    "accuracy_drop": (0.0, 1.0, "points of accuracy as a share, above 0 and up to 1"),
    "kv_share": (0.0, 1.0, "a share of the KV cache from above 0 to 1"),
    "ttft_speedup": (0.0, float("inf"), "a factor above 1"),
}
DEFAULT_SAME_ANSWERS = 0.98


@dataclass(frozen=True)
class Target:
    """One bound. Bounds of quality are met as cheaply as possible, bounds of cost with the best quality.

    Raises:
        ParameterError: `value` makes no sense for `kind`.
    """

    kind: Kind = "same_answers"
    value: float = DEFAULT_SAME_ANSWERS

    def __post_init__(self) -> None:
        low, high, allowed = _ALLOWED[self.kind]
        least = 1.0 if self.kind == "ttft_speedup" else low
        if not least < self.value <= high:
            raise ParameterError(f"{self.kind}={self.value!r}; allowed: {allowed}.")

    @property
    def is_quality(self) -> bool:
        """Whether it bounds what pruning may lose."""
        return self.kind in QUALITY

    @property
    def loss(self) -> float:
        """The mean loss an item may have (see `Trial.losses`)."""
        return 1.0 - self.value if self.kind == "same_answers" else self.value

    @property
    def text(self) -> str:
        """The bound for people."""
        return {
            "same_answers": f"the same answer on {100 * self.value:g} % of items",
            "kl": f"a mean divergence of at most {self.value:g} nats",
            "accuracy_drop": f"at most {100 * self.value:g} points of accuracy lost",
            "kv_share": f"at most {100 * self.value:g} % of the KV cache",
            "ttft_speedup": f"a first token {self.value:g} times as fast",
        }[self.kind]
