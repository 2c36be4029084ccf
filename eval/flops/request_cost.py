"""Cost of one request by stage."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from transformers import PreTrainedConfig

from vlmprune.methods.attention_method import AttentionMethod
from vlmprune.methods.base import Method
from vlmprune.methods.needs import PIXELS

from .families import vision_cost
from .language import LanguageShape
from .selection import attention_macs, encoder_part, selection_macs
from .vision_work import VisionWork

STAGES = ("vision", "projector", "selection", "prefill", "head", "decode")


@dataclass(frozen=True)
class Cost:
    """MACs of one request by stage; `flops` are twice the MACs.

    `selection` is None where the method does not say what it computes; sums then leave it out.
    """

    vision: int = 0
    projector: int = 0
    selection: int | None = 0
    prefill: int = 0
    head: int = 0
    decode: int = 0

    @property
    def prefill_total(self) -> int:
        """MACs until the first token: tower, projector, selection, language model, one row of the output head."""
        return self.vision + self.projector + (self.selection or 0) + self.prefill + self.head

    @property
    def total(self) -> int:
        """MACs of the whole request."""
        return self.prefill_total + self.decode

    def flops(self) -> dict[str, int | None]:
        """FLOPs by stage; None for a selection that is not counted."""
        macs = {name: getattr(self, name) for name in STAGES}
        return {name: None if value is None else 2 * value for name, value in macs.items()}


def request_cost(
    config: PreTrainedConfig,
    work: VisionWork,
    visual_tokens: Sequence[int],
    text_tokens: int,
    new_tokens: int = 0,
    method: Method | None = None,
    images: Sequence[tuple[int, int]] = (),
) -> Cost:
    """Cost of one request.

    Args:
        config: the model's configuration.
        work: what its vision tower is given.
        visual_tokens: `[layers]` visual tokens that each layer of the language model saw.
        text_tokens: all other prompt tokens.
        new_tokens: generated tokens, of which the first comes from the prefill.
        method: whose selection is counted too, if any.
        images: visual tokens of each picture before and after the input of the language model.

    Raises:
        UnknownNameError: the model type is not supported.
    """
    if images and method is not None and any(PIXELS in part.needs for part in method.parts()):
        work = replace(work, kept=tuple(kept for _, kept in images))
    vision, projector = vision_cost(config).macs(config, work, encoder_part(method))
    shape = LanguageShape.from_config(config)
    tokens = [n + text_tokens for n in visual_tokens]
    steps = max(0, new_tokens - 1)
    changing = [part for part in method.parts() if isinstance(part, AttentionMethod)] if method is not None else []
    changed = sum(
        attention_macs(config, part, [n + 1 + step for n in tokens], visual_tokens, 1)
        for part in changing
        for step in range(steps)
    )
    return Cost(
        vision=vision,
        projector=projector,
        selection=0 if method is None else selection_macs(config, method, work, images, visual_tokens, text_tokens),
        prefill=shape.prefill_macs(tokens),
        head=shape.head_macs(),
        decode=shape.decode_macs(tokens, steps) + changed,
    )
