"""`vlmprune.plot`: the latest prefill of a pruned model, drawn."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from typing import TYPE_CHECKING, Any

import vlmprune
from vlmprune.errors import missing_extra
from vlmprune.record import ImageRecord, RunRecord

from .figure import figure_of
from .panels import Panel, score_panel, stage_panels
from .sources import read_picture, read_video
from .tower_pictures import Picture, PictureError, frames_of_video, tiles_of_image

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def plot(model: Any, images: Any, *, processor: Any = None, scores: bool = False) -> Figure:
    """Draw what the latest prefill of `model` kept: kept patches clear, dropped ones faded, merged ones coloured by group.

    Exact for every layout with a geometry: what is drawn is what the vision tower was shown. Methods in stages get a panel a
    stage. Images whose geometry is not known get a bar of kept indices.

    Args:
        model: a model that a method is applied to, after a `generate` or `forward` with images.
        images: the pictures and videos of that call in the order of the prompts: one or a list; a picture is a PIL image or
            a path, a video a path or a list of PIL images (or an array `[frames, height, width, 3]`).
        processor: the model's processor; by default it is loaded from where the model came from.
        scores: add a heat map of what the method ranked the tokens by.

    Returns:
        A figure; `figure.savefig("kept.png")` writes it.

    Raises:
        NotAppliedError: no method is applied.
        NoRunError: no prefill has run since.
        PictureError: the pictures are not those of the prefill, or there is no processor, or nothing to score by.
        MissingExtraError: matplotlib or pillow is not installed.
    """
    require_pictures()
    record = vlmprune.last_run(model)
    given = list(images) if isinstance(images, (list, tuple)) else [images]
    if len(record.videos) == len(record.images) == 1 and len(given) > 1:
        given = [given]
    part = processor if processor is not None else _processor_of(model)
    rows = []
    for image, shown in zip(records_of_prompt(record, len(given)), given, strict=True):
        pictures = seen_by_tower(image.modality, shown, part)
        rows.append(panels_of(image, pictures, patch_size_of(model), record.method, scores))
    return figure_of(rows)


def panels_of(
    record: ImageRecord, pictures: Sequence[Picture], patch_size: int, title: str, scores: bool = False
) -> list[Panel]:
    """Return the panels of one image or video of a prefill.

    Args:
        record: the image.
        pictures: what the tower saw of it.
        patch_size: side of the tower's patches in pixels.
        title: names of the methods.
        scores: add a map of what the method ranked the tokens by.
    """
    panels = stage_panels(record, pictures, patch_size, title)
    if scores:
        if record.scores is None:
            raise PictureError(f"{title!r} does not rank tokens by a score of their own, so there is none to draw.")
        panels.append(score_panel(record, record.scores, pictures, patch_size, title))
    return panels


def seen_by_tower(modality: str, shown: Any, processor: Any) -> list[Picture]:
    """Return what the tower is shown of a picture or video."""
    if modality == "video":
        return frames_of_video(processor, read_video(shown))
    return tiles_of_image(processor, read_picture(shown))


def records_of_prompt(record: RunRecord, count: int) -> list[ImageRecord]:
    """Return the records of the `count` images of the prompts; of a prompt that was expanded for beams, those of its first row.

    Raises:
        PictureError: the prefill saw another number of images.
    """
    images = record.images
    expanded, left = divmod(len(images), count) if count else (0, 1)
    if left or not expanded:
        raise PictureError(f"{count} pictures given, but the latest prefill saw {len(images)}.")
    first = [image for image in images if image.batch_index % expanded == 0]
    if len(first) != count:
        raise PictureError(f"{count} pictures given, but the latest prefill saw {len(images)}.")
    return first


def patch_size_of(model: Any) -> int:
    """Return the side of the vision tower's patches in pixels; 1 where the configuration does not say."""
    from vlmprune.patches.families.wrappers import find_inside

    found = find_inside(model, lambda item: hasattr(getattr(item, "config", None), "vision_config"))
    vision = None if found is None else found.config.vision_config
    size: Any = getattr(vision, "patch_size", 1)
    return int(size[0] if isinstance(size, Sequence) else size)


def require_pictures() -> None:
    """Raise MissingExtraError unless matplotlib and pillow are there."""
    from importlib.util import find_spec

    for module in ("matplotlib", "PIL"):
        if find_spec(module) is None:
            raise missing_extra("eval", module)


def _processor_of(model: Any) -> Any:
    from transformers import AutoProcessor

    from vlmprune.patches.families.wrappers import find_inside

    found = find_inside(model, lambda item: bool(getattr(item, "name_or_path", None)))
    source: str | PathLike[str] = "" if found is None else found.name_or_path
    if not source:
        raise PictureError(
            "It is not known where this model came from; pass its processor: plot(model, images, processor=...)."
        )
    try:
        return AutoProcessor.from_pretrained(source)
    except Exception as error:
        raise PictureError(f"No processor can be loaded from {str(source)!r}; pass processor=...: {error}") from error
