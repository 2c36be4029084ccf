"""A tiny model of any class of transformers that encodes images, and prompts for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from support.general.hosts import CHANGES
from support.general.pictures import recipes
from support.general.shrunk import model_class, shrunk_config
from support.tiny_models import PAD, spread_weights

_TYPES = ("mm_token_type_ids", "moe_mm_token_type_ids", "token_type_ids")


@dataclass(eq=False)
class HostCase:
    """One class, built small.

    Attributes:
        model: the model, on the CPU, in fp32.
        picture: makes the processor's tensors of a named image.
        multimodal: the module that encodes images.
    """

    model: Any
    picture: Callable[[str], dict[str, Tensor]]
    multimodal: Any
    counts: dict[str, int] = field(default_factory=dict)

    def tokens(self, image: str) -> int:
        """Placeholders of a named image."""
        if image not in self.counts:
            with torch.no_grad():
                features = self.multimodal.get_image_features(**self.picture(image)).pooler_output
            self.counts[image] = sum(feature.shape[:-1].numel() for feature in features)
        return self.counts[image]

    def inputs(self, rows: Sequence[Sequence[int | str]]) -> dict[str, Tensor]:
        """Return the inputs of a left-padded batch; an int stands for so many text tokens, a string for an image."""
        placeholder = self.model.config.image_token_id
        ids: list[list[int]] = []
        for row in rows:
            made: list[int] = []
            for item in row:
                if isinstance(item, str):
                    made += [placeholder] * self.tokens(item)
                else:
                    made += [11 + (7 * len(made) + 3 * step) % 90 for step in range(item)]
            ids.append(made)
        width = max(map(len, ids))
        padded = torch.tensor([[PAD] * (width - len(row)) + row for row in ids])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in ids])
        pictures = [self.picture(item) for row in rows for item in row if isinstance(item, str)]
        # Towers that take `target_sizes` have all pictures side by side in one.
        beside = {"pixel_values": -1} if "target_sizes" in pictures[0] else {}
        tensors = {
            name: torch.cat([picture[name] for picture in pictures], dim=beside.get(name, 0)) for name in pictures[0]
        }
        taken = inspect.signature(type(self.multimodal).forward).parameters
        types = {name: (padded == placeholder).long() for name in _TYPES if name in taken}
        if type(self.multimodal).__name__.startswith("PaliGemma"):
            # 0 is the prompt, 1 the answer.
            types = {"token_type_ids": torch.zeros_like(padded)}
        return {"input_ids": padded, "attention_mask": mask, **tensors, **types}


def build(name: str) -> HostCase:
    """Return a class as a small case.

    Raises:
        ValueError: nothing was found that its `get_image_features` takes; the last error is the cause.
    """
    cls: Any = model_class(name)
    torch.manual_seed(0)
    model = spread_weights(cls(shrunk_config(cls, **CHANGES.get(name, {})))).eval()
    inner = getattr(model, "model", None)
    multimodal = inner if hasattr(inner, "get_image_features") else model
    error: Exception | None = None
    for picture in recipes(multimodal.get_image_features, model.config):
        try:
            case = HostCase(model, picture, multimodal)
            if case.tokens("A"):
                return case
        except Exception as caught:
            error = caught
    raise ValueError(f"No pixels for {name}.") from error
