"""The same picture at a lower resolution, given to the unpruned model: the cheap baseline that spares the vision tower too.

It is a choice of processing and no method: nothing is dropped, the tower just gets fewer pixels.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from math import isqrt
from typing import Any

from PIL import Image
from transformers import PreTrainedModel

from vlmprune.budget import Keep, token_budget
from vlmprune.errors import UnsupportedMethodError, VlmpruneError
from vlmprune.methods.baselines.pool import pooled_grid
from vlmprune.patches.families.family import Family
from vlmprune.patches.families.registry import find_family

LOWER_RESOLUTION = "lower_resolution"
_INTERPOLATE = "interpolate_pos_encoding"


class LowerResolution:
    """Pictures of as many pixels as give at most `keep` visual tokens.

    Towers that take pictures of any size get one resized to the nearest smaller grid of whole visual tokens, the grid that
    `pool` pools to, with the processor's filter. CLIP and SigLIP towers over one tile get the largest smaller square of
    patches: all sizes of the processor are scaled alike, and the position embeddings interpolated
    (`interpolate_pos_encoding`, which the tower has and the model around it does not hand on).

    Attributes:
        keep: a share of the visual tokens that a picture has at its own resolution, or their number.
    """

    def __init__(self, model: PreTrainedModel, processor: Any, keep: Keep) -> None:
        self.family = find_family(model)
        check_lower_resolution(self.family)
        self.processor = processor
        self.keep = keep
        self._grids: dict[tuple[int, int], tuple[int, int]] = {}

    def whole_tokens(self, pictures: Sequence[Image.Image]) -> list[int]:
        """Return the visual tokens of every picture at its own resolution."""
        return [rows * columns for rows, columns in map(self._grid, pictures)]

    def smaller_grid(self, picture: Image.Image) -> tuple[int, int]:
        """Return the rows and columns of visual tokens that the picture gets."""
        rows, columns = self._grid(picture)
        budget = token_budget(self.keep, rows * columns)
        if budget == rows * columns:
            return rows, columns
        if self.family.tower_kind == "packed":
            return pooled_grid(rows, columns, budget)
        return isqrt(budget), isqrt(budget)

    def shrink(self, pictures: Sequence[Image.Image]) -> tuple[list[Image.Image], dict[str, Any]]:
        """Return pictures, and arguments of the processor, that give the smaller grids."""
        grids = [self.smaller_grid(picture) for picture in pictures]
        if grids == [self._grid(picture) for picture in pictures]:
            return list(pictures), {}
        image = self.processor.image_processor
        if self.family.tower_kind == "packed":
            edge = int(image.merge_size) * int(image.patch_size)
            filtering = Image.Resampling(int(getattr(image, "resample", None) or Image.Resampling.BICUBIC))
            resized = [
                picture.convert("RGB").resize((columns * edge, rows * edge), filtering)
                for picture, (rows, columns) in zip(pictures, grids, strict=True)
            ]
            return resized, {"do_resize": False}
        smaller, whole = grids[0][0], self._grid(pictures[0])[0]
        sizes = {name: dict(getattr(image, name)) for name in ("size", "crop_size") if getattr(image, name, None)}
        scaled = {
            name: {edge: round(pixels * smaller / whole) for edge, pixels in edges.items() if pixels}
            for name, edges in sizes.items()
        }
        return list(pictures), scaled

    def _grid(self, picture: Image.Image) -> tuple[int, int]:
        """Rows and columns of visual tokens at the picture's own resolution."""
        if self.family.tower_kind == "dense":
            vision = self.family.config.vision_config
            side = int(vision.image_size) // int(vision.patch_size)
            return side, side
        if picture.size not in self._grids:
            image = self.processor.image_processor
            _, rows, columns = image(images=[picture], return_tensors="pt")["image_grid_thw"][0].tolist()
            self._grids[picture.size] = (rows // image.merge_size, columns // image.merge_size)
        return self._grids[picture.size]


def check_lower_resolution(family: Family) -> None:
    """Raise UnsupportedMethodError unless the vision tower gives fewer visual tokens for smaller pictures."""
    if family.picture_kind not in ("one tile", "grids"):
        raise UnsupportedMethodError(
            f"{LOWER_RESOLUTION!r} needs a vision tower that takes smaller pictures; {family.name} cuts pictures in tiles of "
            "one size, to which a smaller one is scaled up again. Allowed: models over one tile (LLaVA, ViP-LLaVA) and Qwen-VL; "
            "'pool' and 'uniform' act behind the tower."
        )
    if family.tower_kind == "dense" and _INTERPOLATE not in inspect.signature(family.vision_tower.forward).parameters:
        raise UnsupportedMethodError(
            f"{LOWER_RESOLUTION!r} needs a vision tower that interpolates its position embeddings, and "
            f"{type(family.vision_tower).__name__} has no {_INTERPOLATE}."
        )


def serves_smaller_pictures(model: PreTrainedModel, processor: Any) -> bool:
    """Whether a model and its processor can be given smaller pictures, tried on a made-up one."""
    try:
        LowerResolution(model, processor, 0.5).shrink([Image.new("RGB", (224, 160))])
    except (VlmpruneError, AttributeError, KeyError, TypeError, ValueError):
        # What a processor calls its sizes is its own affair; a row nobody asked for is then left out.
        return False
    return True


@contextmanager
def taking_smaller_pictures(model: PreTrainedModel) -> Iterator[PreTrainedModel]:
    """A context in which the vision tower interpolates its position embeddings, where it has to be told so.

    Raises:
        UnsupportedMethodError: smaller pictures do not give fewer visual tokens.
    """
    family = find_family(model)
    check_lower_resolution(family)
    if family.tower_kind == "packed":
        yield model
        return

    def interpolate(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        return args, {**kwargs, _INTERPOLATE: True}

    handle = family.vision_tower.register_forward_pre_hook(interpolate, with_kwargs=True)
    try:
        yield model
    finally:
        handle.remove()
