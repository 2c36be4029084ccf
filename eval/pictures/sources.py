"""Pictures and videos read from what a user names."""

from __future__ import annotations

from os import PathLike, fspath
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from .tower_pictures import PictureError

CLIPS = frozenset({".mp4", ".avi", ".mov", ".mkv", ".webm", ".gif"})
FRAMES = 8
"""Frames taken from a clip, evenly."""


def is_video(shown: Any) -> bool:
    """Whether this is surely a video: a clip's path, or frames in one array."""
    if isinstance(shown, (str, PathLike)):
        return Path(shown).suffix.lower() in CLIPS
    return isinstance(shown, np.ndarray) and shown.ndim == 4


def read_picture(shown: Any) -> Any:
    """Return a picture as a PIL image in RGB.

    Raises:
        PictureError: it is no picture.
    """
    from PIL import Image

    if isinstance(shown, Image.Image):
        return shown.convert("RGB")
    if isinstance(shown, (str, PathLike)):
        try:
            with Image.open(shown) as file:
                return file.convert("RGB")
        except (OSError, ValueError, Image.DecompressionBombError) as error:
            raise PictureError(f"{fspath(shown)!r} is no picture that can be read: {error}") from error
    raise PictureError(f"A {type(shown).__name__} is no picture; allowed: a PIL image or a path.")


def read_video(shown: Any, frames: int = FRAMES) -> NDArray[np.uint8]:
    """Return a video as uint8 `[frames, height, width, 3]`; of a clip `frames` frames, evenly spaced.

    Raises:
        PictureError: it is no video, or it cannot be decoded.
    """
    if isinstance(shown, (list, tuple)):
        return np.stack([np.asarray(read_picture(frame)) for frame in shown])
    if isinstance(shown, np.ndarray) and shown.ndim == 4:
        return shown
    if not is_video(shown):
        raise PictureError(
            f"A {type(shown).__name__} is no video; allowed: a path, a list of pictures, or an array of frames."
        )
    try:
        return _decoded(Path(shown), frames)
    except ImportError as error:
        raise PictureError(f"Clips need PyAV (pip install av), or pass the frames: {error}") from error
    except (OSError, ValueError) as error:
        raise PictureError(f"{fspath(shown)!r} is no clip that can be read: {error}") from error


def _decoded(path: Path, frames: int) -> NDArray[np.uint8]:
    import av

    with av.open(str(path)) as clip:
        decoded = [frame.to_ndarray(format="rgb24") for frame in clip.decode(video=0)]
    if not decoded:
        raise ValueError("it holds no frames")
    chosen = np.linspace(0, len(decoded) - 1, min(frames, len(decoded))).round().astype(int)
    return np.stack([decoded[index] for index in chosen])
