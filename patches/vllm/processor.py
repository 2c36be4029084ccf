"""vLLM's multimodal processors with as many placeholders an image as tokens are kept."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from vllm.multimodal.parse import EmbeddingItems
from vllm.multimodal.processing import PromptUpdate, PromptUpdateDetails

from vlmprune.errors import UnsupportedCallError

from .facts import VllmFamily
from .health import count_images
from .settings import ServedMethod, read_setting


@dataclass
class KeptPlaceholders(PromptUpdateDetails):
    """The placeholders of one image.

    Attributes:
        visual_tokens: how many visual tokens the image has.
    """

    visual_tokens: int = 0


class ImagesOnly:
    """Mixin of vLLM's processing infos: with the setting, prompts hold images and text."""

    def get_supported_mm_limits(self) -> Mapping[str, int | None]:
        """Return the limits: those of images, and none of what is not served."""
        limits: Mapping[str, int | None] = super().get_supported_mm_limits()  # type: ignore[misc]
        if read_setting(self.get_hf_config()) is None:  # type: ignore[attr-defined]
            return limits
        return {modality: limit if modality == "image" else 0 for modality, limit in limits.items()}


class KeptTokensProcessor:
    """Mixin of vLLM's multimodal processors; without the setting it does nothing.

    Attributes:
        family: the facts of the models whose prompts it prepares.
    """

    family: type[VllmFamily]
    info: Any

    @property
    def served(self) -> ServedMethod | None:
        """The setting, or None."""
        return read_setting(self.info.get_hf_config())

    def _get_prompt_updates(
        self, mm_items: Any, hf_processor_mm_kwargs: Mapping[str, Any], out_mm_kwargs: Any
    ) -> Sequence[PromptUpdate]:
        updates = super()._get_prompt_updates(mm_items, hf_processor_mm_kwargs, out_mm_kwargs)  # type: ignore[misc]
        served = self.served
        if served is None:
            return updates
        if "image" in mm_items and isinstance(mm_items["image"], EmbeddingItems):
            raise UnsupportedCallError(
                "The prompt gives embeddings of an image in its place, which vlmprune does not prune; allowed: images."
            )
        return [
            replace(update, replacement=partial(self._kept, update.replacement, served, out_mm_kwargs))
            if update.modality == "image"
            else update
            for update in updates
        ]

    def _kept(self, content: Any, served: ServedMethod, out_mm_kwargs: Any, item_index: int) -> KeptPlaceholders:
        placeholders = content(item_index) if callable(content) else content
        ids: list[int] = getattr(placeholders, "full", placeholders)
        if len(set(ids)) > 1:
            raise UnsupportedCallError(
                "An image with other tokens between its visual tokens is not served with pruning."
            )
        items = out_mm_kwargs["image"]
        grid = self.family.image_grid(self.info.get_hf_config(), items[item_index], len(ids))
        count = served.method.kept_count(len(ids), grid)
        return KeptPlaceholders(ids[:count], visual_tokens=len(ids))

    def _get_mm_hashes(self, inputs: Any) -> Any:
        hashes = super()._get_mm_hashes(inputs)  # type: ignore[misc]
        served = self.served
        if served is None:
            return hashes
        return {
            modality: [_with_identity(item, served.identity) for item in items] if modality == "image" else items
            for modality, items in hashes.items()
        }

    def _maybe_apply_prompt_updates(self, mm_items: Any, mm_res: Any) -> Any:
        placed = super()._maybe_apply_prompt_updates(mm_items, mm_res)  # type: ignore[misc]
        contents = [
            update.content
            for item in mm_res.prompt_updates.get("image", ())
            for update in item
            if isinstance(update.content, KeptPlaceholders)
        ]
        if contents:
            count_images([content.visual_tokens for content in contents], [len(content.full) for content in contents])
        return placed


def _with_identity(item: str, identity: str) -> str:
    """Return the identity of an image and of how it is pruned: what is cached of it under other settings is something else."""
    return hashlib.sha256(f"{identity}\0{item}".encode()).hexdigest()
