"""What a method sees of the first decoder layer, and which text asks it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True, eq=False)
class FirstLayer:
    """The projections of the first decoder layer, without rotary positions.

    Attributes:
        family: the name of the model family.
        width: width of the language model.
        heads: attention heads.
        scale: factor of the logits.
        queries: turns embeddings `[tokens, dim]`, as they enter the language model, into queries `[tokens, heads, head_dim]`;
            the layer's input norm is part of it, and the norm of queries where it has one.
        keys: the same for keys, `[tokens, kv_heads, head_dim]`.
    """

    family: str
    width: int
    heads: int
    scale: float
    queries: Callable[[Tensor], Tensor]
    keys: Callable[[Tensor], Tensor]


def question_range(
    ids: Sequence[int], last_visual: int, image_end: int | None = None, turn_end: frozenset[int] = frozenset()
) -> tuple[int, int]:
    """Return where the question of a prompt begins and ends.

    Args:
        ids: token ids of the prompt; only places of `image_end` and `turn_end` matter.
        last_visual: index of the last visual token.
        image_end: the id that closes an image, if there is one.
        turn_end: ids that close a turn.

    Returns:
        The first index and the one after the last: from behind the last `image_end` (or visual token) up to the last of
        `turn_end` that lies behind the first index, else to the end; one token further in front if that is nothing.
    """
    ends = [index for index, token in enumerate(ids) if token == image_end]
    begin = (ends[-1] if ends else last_visual) + 1
    turns = [index for index in range(begin + 1, len(ids)) if ids[index] in turn_end]
    end = turns[-1] if turns else len(ids)
    return (begin, end) if begin < end else (begin - 1, begin)
