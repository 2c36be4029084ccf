"""What one run of the vision tower leaves behind for the prefill that uses its features."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import VisionSignal

if TYPE_CHECKING:
    from ..families.family import Family
    from .tower_tokens import TowerTokens

_ATTRIBUTE = "_vlmprune_signals"


@dataclass(eq=False)
class EncodedVisuals:
    """The images, or the videos, of one call of `get_image_features` or `get_video_features`.

    It is attached to the output of that call, because `generate` encodes outside the model's forward. The host may hand the
    prefill another object than that output, with features moved, split or repeated; see `find_encoded`.

    Attributes:
        modality: "image" or "video".
        inputs: arguments of the call by name, without the pixels.
        counts: visual tokens of each encoded image or video.
        vision: per requested signal what the family's tower reader gives, fp32.
        features: the projected features as the call returned them, an item per image or video, `[tokens, dim]`.
        tower: what an encoder method made of the tower's tokens; None where it made nothing.
    """

    modality: str
    inputs: Mapping[str, Any]
    counts: tuple[int, ...]
    vision: dict[VisionSignal, Tensor]
    features: Tensor | Sequence[Tensor] = ()
    tower: TowerTokens | None = None
    _layouts: tuple[VisualLayout, ...] | None = field(default=None, repr=False)

    @property
    def offsets(self) -> tuple[int, ...]:
        """Start of each image or video in the packed tokens, and the end of the last."""
        return tuple(accumulate(self.counts, initial=0))

    def layouts(self, family: Family) -> tuple[VisualLayout, ...]:
        """Return the layout of each image or video, computed once."""
        if self._layouts is None:
            self._layouts = family.layouts(self)
        return self._layouts


class LiveEncodings:
    """The encodings of one patched model whose output somebody still holds, of whatever thread or generation.

    It keeps none of them alive. An output that the host has rebuilt (accelerate does, when it moves a call's arguments) no
    longer carries its `EncodedVisuals`; the original is alive as long as `generate` runs, and is found here by the features.
    """

    def __init__(self) -> None:
        self._alive: weakref.WeakSet[EncodedVisuals] = weakref.WeakSet()
        self._lock = threading.Lock()

    def add(self, visuals: EncodedVisuals) -> None:
        """Remember an encoding for as long as it lives."""
        with self._lock:
            self._alive.add(visuals)

    def of(self, modality: str) -> list[EncodedVisuals]:
        """Return the living encodings of a modality."""
        with self._lock:
            return [visuals for visuals in self._alive if visuals.modality == modality]

    def __deepcopy__(self, memo: dict[int, Any]) -> LiveEncodings:
        return LiveEncodings()

    def __reduce__(self) -> tuple[type[LiveEncodings], tuple[()]]:
        return LiveEncodings, ()


def encoded_visuals(output: Any) -> EncodedVisuals | None:
    """Return what is attached to an output of the vision tower; None if it was made without an applied method."""
    return getattr(output, _ATTRIBUTE, None)


def set_encoded_visuals(output: Any, visuals: EncodedVisuals) -> None:
    """Attach it to the output, with which it travels."""
    setattr(output, _ATTRIBUTE, visuals)


def find_encoded(
    features: Sequence[Tensor], candidates: Sequence[EncodedVisuals]
) -> list[tuple[EncodedVisuals, int]] | None:
    """Return for every image the encoding it comes from and its number there, or None if features come from none.

    Features are recognised as the very tensors that were encoded or parts of them, or where they were moved, cast, stacked or
    joined since, by their values; so signals are never used for other features than their own. Comparing values waits for
    the device.

    Args:
        features: `[tokens, dim]` per image or video, or of several as one item, which a prefill in chunks gives.
        candidates: where to look, the most likely first.
    """
    for visuals in candidates:
        if features is visuals.features:
            return [(visuals, image) for image in range(len(visuals.counts))]
    encoded = [(visuals, list(visuals.features)) for visuals in candidates if len(visuals.features)]
    origins = [
        _origin(feature, place, encoded, _same_memory) or _origin(feature, place, encoded, _same_values)
        for place, feature in enumerate(features)
    ]
    found = [origin for origin in origins if origin is not None]
    if len(found) == len(origins):
        return found
    return _joined(features[0], encoded) if len(features) == 1 else None


def _joined(
    features: Tensor, encoded: Sequence[tuple[EncodedVisuals, list[Tensor]]]
) -> list[tuple[EncodedVisuals, int]] | None:
    found: list[tuple[EncodedVisuals, int]] = []
    rest = features
    while len(rest):
        # The next image after the last found is nearly always right.
        place = found[-1][1] + 1 if found else 0
        for visuals, originals in encoded:
            images = (place + step for step in range(len(originals)))
            image = next((i % len(originals) for i in images if _begins(rest, originals[i % len(originals)])), None)
            if image is not None:
                found.append((visuals, image))
                rest = rest[len(originals[image]) :]
                break
        else:
            return None
    return found


def _begins(features: Tensor, original: Tensor) -> bool:
    return len(original) > 0 and _same_values(features[: len(original)], original)


def _origin(
    feature: Tensor,
    place: int,
    encoded: Sequence[tuple[EncodedVisuals, list[Tensor]]],
    same: Callable[[Tensor, Tensor], bool],
) -> tuple[EncodedVisuals, int] | None:
    for visuals, originals in encoded:
        # Repeated groups keep their order, so the first guess is nearly always right.
        for image in (place % len(originals), *range(len(originals))):
            if same(feature, originals[image]):
                return visuals, image
    return None


def _same_memory(feature: Tensor, original: Tensor) -> bool:
    """Whether one is the other, or they are the same part of one tensor."""
    if feature is original:
        return True
    return (
        feature.shape == original.shape
        and feature.stride() == original.stride()
        and feature.dtype == original.dtype
        and feature.device == original.device
        and feature.device.type != "meta"
        and feature.data_ptr() == original.data_ptr() != 0
    )


def _same_values(feature: Tensor, original: Tensor) -> bool:
    if feature.shape != original.shape or feature.is_meta or original.is_meta:
        return False
    moved = original.detach().to(feature.device, feature.dtype)
    # Compared as bytes, so that features which overflowed to NaN are recognised too.
    return torch.equal(feature.detach().contiguous().view(torch.uint8), moved.contiguous().view(torch.uint8))
