"""What one run of the vision tower leaves behind for the prefill that uses its features."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import VisionSignal

if TYPE_CHECKING:
    from ..families.family import Family

_ATTRIBUTE = "_vlmprune_signals"


@dataclass(eq=False)
class EncodedVisuals:
    """The images, or the videos, of one call of `get_image_features` or `get_video_features`.

    It is attached to the output of that call, because `generate` encodes outside the model's forward, and then repeats
    the features (but not what is said here) for beams and return sequences.

    Attributes:
        modality: "image" or "video".
        inputs: arguments of the call by name, without the pixels.
        counts: visual tokens of each encoded image or video.
        vision: per requested signal what the family's tower reader gives, fp32.
    """

    modality: str
    inputs: Mapping[str, Any]
    counts: tuple[int, ...]
    vision: dict[VisionSignal, Tensor]
    _layouts: tuple[VisualLayout, ...] | None = field(default=None, repr=False)

    def layouts(self, family: Family) -> tuple[VisualLayout, ...]:
        """Return the layout of each image or video, computed once."""
        if self._layouts is None:
            self._layouts = family.layouts(self)
        return self._layouts


def encoded_visuals(output: Any) -> EncodedVisuals | None:
    """Return what is attached to an output of the vision tower; None if it was made without an applied method."""
    return getattr(output, _ATTRIBUTE, None)


def set_encoded_visuals(output: Any, visuals: EncodedVisuals) -> None:
    """Attach it to the output, with which it travels."""
    setattr(output, _ATTRIBUTE, visuals)
