"""Where the visual tokens of an image lie, of a class that no family knows: by the processor's grids, or by square tiles."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any, Literal

from torch import Tensor, nn

from vlmprune.layout import VisualLayout, raster_layout, unknown_layout

from ..tower.encoded_visuals import EncodedVisuals

# Towers over square tiles, whose patches lie in a raster.
_SQUARE_TOWERS = ("clip", "siglip", "internvl")
# Parts of the names of learned queries, whose outputs stand for no place.
_QUERIES = ("query", "queries", "latents", "qformer", "resampler", "perceiver")


@dataclass(frozen=True)
class Geometry:
    """How the places of visual tokens are told.

    Attributes:
        kind: "grids" by `image_grid_thw`, "square" by equally large tiles that are items of the features, or "unknown".
        side: of "grids" the patches along the side of a token; of "square" the patches along the side of a tile.
        why: why the kind is unknown.
    """

    kind: Literal["grids", "square", "unknown"]
    side: int = 1
    why: str = ""

    def layouts(self, visuals: EncodedVisuals) -> tuple[VisualLayout, ...]:
        """Return a raster per image or video; of unknown geometry where the tokens are not as many as its places."""
        rasters: list[VisualLayout | None] = [None] * len(visuals.counts)
        grids: Any = visuals.inputs.get(f"{visuals.modality}_grid_thw")
        if self.kind == "grids" and isinstance(grids, Tensor) and len(grids) == len(visuals.counts):
            rasters = [
                raster_layout(rows // self.side, columns // self.side, frames)
                for frames, rows, columns in grids.tolist()
            ]
        elif self.kind == "square" and visuals.modality == "image":
            rasters = [self._square(count) for count in visuals.counts]
        return tuple(
            raster if raster is not None and raster.total == count else unknown_layout(count)
            for raster, count in zip(rasters, visuals.counts, strict=True)
        )

    def _square(self, count: int) -> VisualLayout | None:
        side = round(count**0.5)
        # Several patches become one token by whole cells only.
        return raster_layout(side, side) if side * side == count and self.side % side == 0 else None


def read_geometry(multimodal_model: nn.Module, language_model: nn.Module, config: Any) -> Geometry:
    """Return how the places of visual tokens are told in a class that was found by looking at it."""
    vision: Any = getattr(config, "vision_config", None)
    inside = {id(parameter) for parameter in language_model.parameters()}
    names = [name for name, parameter in multimodal_model.named_parameters() if id(parameter) not in inside]
    learned = next((name for name in names if any(part in name.lower() for part in _QUERIES)), None)
    if learned is not None:
        return Geometry("unknown", why=f"`{learned}` may be learned queries, whose outputs stand for no place")
    taken = inspect.signature(multimodal_model.get_image_features).parameters  # type: ignore[arg-type]
    merge = getattr(vision, "spatial_merge_size", None)
    if "image_grid_thw" in taken:
        if not isinstance(merge, int):
            return Geometry("unknown", why="there is no `vision_config.spatial_merge_size` beside `image_grid_thw`")
        return Geometry("grids", merge)
    kind, size, patch = (getattr(vision, name, None) for name in ("model_type", "image_size", "patch_size"))
    size, patch = (
        value[0] if isinstance(value, (list, tuple)) and len(set(value)) == 1 else value for value in (size, patch)
    )
    if not any(name in str(kind) for name in _SQUARE_TOWERS):
        return Geometry(
            "unknown", why=f"the tower is {kind!r}, and places are known of {', '.join(_SQUARE_TOWERS)} and of grids"
        )
    if not isinstance(size, int) or not isinstance(patch, int) or size % patch:
        return Geometry("unknown", why=f"tiles of {size} pixels are no whole patches of {patch}")
    if "image_sizes" in taken or "spatial_shapes" in taken:
        return Geometry(
            "unknown", why="images are put together of tiles, or are of any size, in a way only a family knows"
        )
    return Geometry("square", size // patch)
