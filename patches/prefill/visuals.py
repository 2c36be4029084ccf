"""The images and videos of one prefill, and where they stand in the prompt."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import TILE_KINDS, VisionSignal
from vlmprune.methods.needs import WHOLE_TILES, Need

from ..calls import ModelCall
from ..families.family import Family
from ..tower.encoded_visuals import EncodedVisuals, LiveEncodings, encoded_visuals, find_encoded
from .image_spans import ImageSpans, find_image_spans, merge_spans


@dataclass(frozen=True, eq=False)
class ShownVisuals:
    """What the prefill shows of one encoding: mostly all of it.

    Attributes:
        visuals: the encoding.
        images: which of its images or videos, ascending.
    """

    visuals: EncodedVisuals
    images: tuple[int, ...]

    def layouts(self, family: Family) -> tuple[VisualLayout, ...]:
        """Return the layout of each shown image."""
        layouts = self.visuals.layouts(family)
        return tuple(layouts[image] for image in self.images)

    def token_vision(self, family: Family, signal: VisionSignal) -> Tensor:
        """Return a signal of the shown images, `[their visual tokens, heads]`."""
        visuals = self.visuals
        tokens = family.token_vision(visuals.vision[signal], visuals, visuals.layouts(family))
        if len(self.images) == len(visuals.counts):
            return tokens
        parts = tokens.split(list(visuals.counts))
        return torch.cat([parts[image] for image in self.images])

    def tile_vision(self, family: Family, signal: VisionSignal) -> tuple[Tensor, ...]:
        """Return a signal on all tiles of each shown image."""
        maps = family.tile_vision(self.visuals.vision[signal], self.visuals, self.visuals.layouts(family))
        return tuple(maps[image] for image in self.images)

    def tile_rows(self, family: Family, signal: VisionSignal) -> tuple[Tensor, ...]:
        """Return what a signal has a row a tile of, for each shown image."""
        rows = family.tile_rows(self.visuals.vision[signal], self.visuals.layouts(family))
        return tuple(rows[image] for image in self.images)


@dataclass(frozen=True, eq=False)
class PrefillVisuals:
    """What a prefill knows of its images and videos.

    Attributes:
        encoded: what the vision tower left behind, one modality after the other; nothing where the caller merged the features.
        spans: the columns of each image in the prompt, repetitions for beams included.
        layouts: geometry of each shown image, in the order of `encoded`.
    """

    encoded: tuple[ShownVisuals, ...]
    spans: ImageSpans
    layouts: tuple[VisualLayout, ...]

    @property
    def modalities(self) -> list[str]:
        """The modality, "image" or "video", of each shown image."""
        return [shown.visuals.modality for shown in self.encoded for _ in shown.images] or ["image"] * len(self.layouts)


def read_signals(
    family: Family,
    signals: Sequence[VisionSignal],
    encoded: Sequence[ShownVisuals],
    needs: Collection[Need],
    device: torch.device,
) -> tuple[dict[VisionSignal, Tensor], dict[VisionSignal, tuple[Tensor, ...]]]:
    """Return what a method reads of the vision tower, as `VisualBatch.vision` and `VisualBatch.tile_vision` have it.

    Args:
        family: the model's adapter.
        signals: what the method reads.
        encoded: what the prefill shows of each encoding.
        needs: what the method needs beside them.
        device: where the signals are wanted.
    """
    vision, tile_vision = {}, {}
    for signal in signals:
        if signal.kind in TILE_KINDS:
            tile_vision[signal] = tuple(
                tiles.to(device) for shown in encoded for tiles in shown.tile_rows(family, signal)
            )
            continue
        vision[signal] = torch.cat([shown.token_vision(family, signal).to(device) for shown in encoded])
        if WHOLE_TILES in needs:
            tile_vision[signal] = tuple(
                maps.to(device) for shown in encoded for maps in shown.tile_vision(family, signal)
            )
    return vision, tile_vision


def read_visuals(
    family: Family, call: ModelCall, signals: Sequence[VisionSignal], live: LiveEncodings
) -> PrefillVisuals:
    """Match what the encoders of this call returned with the placeholders of the prompt.

    Args:
        family: the model's adapter.
        call: the running forward.
        signals: the tower attention that must have been captured.
        live: where encodings are looked for whose output was rebuilt.

    Raises:
        UnsupportedCallError: features that were made without the applied method.
        LayoutError: placeholders and features do not fit together.
    """
    encoded: list[ShownVisuals] = []
    spans = []
    for modality, output in call.encoded.items():
        features = family.feature_items(modality, output.pooler_output)
        # An item of no tokens stands for a row of text, where features come by row.
        origins = [
            origin for origin in _origins(modality, output, features, signals, live) if origin[0].counts[origin[1]]
        ]
        counts = [visuals.counts[image] for visuals, image in origins]
        shown: dict[EncodedVisuals, set[int]] = {}
        for visuals, image in origins:
            shown.setdefault(visuals, set()).add(image)
        parts = [ShownVisuals(visuals, tuple(sorted(images))) for visuals, images in shown.items()]
        number = {
            (part.visuals, image): place
            for place, (part, image) in enumerate((part, image) for part in parts for image in part.images)
        }
        spans.append(
            find_image_spans(call.modality_masks[modality], counts, [number[each] for each in origins], modality)
        )
        encoded += parts
    layouts = tuple(layout for part in encoded for layout in part.layouts(family))
    return PrefillVisuals(tuple(encoded), merge_spans(spans), layouts)


def _origins(
    modality: str,
    output: object,
    features: Sequence[Tensor],
    signals: Sequence[VisionSignal],
    live: LiveEncodings,
) -> list[tuple[EncodedVisuals, int]]:
    own = encoded_visuals(output)
    candidates = [visuals for visuals in live.of(modality) if visuals is not own]
    origins = find_encoded(features, candidates if own is None else [own, *candidates])
    if origins is None or any(signal not in visuals.vision for visuals, _ in origins for signal in signals):
        raise UnsupportedCallError(
            f"The {modality} features of this call were not encoded under the applied method: they were computed "
            f"before `apply`, split by `prefill_chunk_size`, or changed since. Pass the pixels, or the output of "
            f"`get_{modality}_features` as it is, and leave `prefill_chunk_size` unset."
        )
    return origins
