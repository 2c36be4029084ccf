"""The images and videos of one prefill, and where they stand in the prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from vlmprune.errors import UnsupportedCallError
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import VisionSignal

from ..calls import ModelCall
from ..families.family import Family
from ..tower.encoded_visuals import EncodedVisuals, encoded_visuals
from .image_spans import ImageSpans, find_image_spans, merge_spans


@dataclass(frozen=True, eq=False)
class PrefillVisuals:
    """What a prefill knows of its images and videos.

    Attributes:
        encoded: per modality what the vision tower left behind.
        spans: the columns of each image in the prompt, repetitions for beams included.
        layouts: geometry of each encoded image, one modality after the other.
    """

    encoded: tuple[EncodedVisuals, ...]
    spans: ImageSpans
    layouts: tuple[VisualLayout, ...]

    @property
    def modalities(self) -> list[str]:
        """ "image" or "video" for each encoded image."""
        return [visuals.modality for visuals in self.encoded for _ in visuals.counts]


def read_visuals(family: Family, call: ModelCall, signals: Sequence[VisionSignal]) -> PrefillVisuals:
    """Match what the encoders of this call returned with the placeholders of the prompt.

    Args:
        family: the model's adapter.
        call: the running forward.
        signals: the tower attention that must have been captured.

    Raises:
        UnsupportedCallError: features that were made without the applied method.
        LayoutError: placeholders and features do not fit together.
    """
    encoded = tuple(_captured(modality, output, signals) for modality, output in call.encoded.items())
    spans = [
        find_image_spans(
            call.modality_masks[visuals.modality],
            family.token_counts(visuals.modality, call.encoded[visuals.modality].pooler_output),
            visuals.counts,
            visuals.modality,
        )
        for visuals in encoded
    ]
    layouts = tuple(layout for visuals in encoded for layout in visuals.layouts(family))
    return PrefillVisuals(encoded, merge_spans(spans), layouts)


def _captured(modality: str, output: object, signals: Sequence[VisionSignal]) -> EncodedVisuals:
    visuals = encoded_visuals(output)
    if visuals is None or any(signal not in visuals.vision for signal in signals):
        raise UnsupportedCallError(
            f"The {modality} features of this call were not encoded under the applied method: they were computed "
            "before `apply`, or split by `prefill_chunk_size`. Pass the pixels, and leave `prefill_chunk_size` unset."
        )
    return visuals
