"""Videos of questions: files, read as lmms-eval reads them, and frames that a task holds in memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from vlmprune.errors import UnsupportedCallError, VlmpruneError

VIDEO_FILES = frozenset({".mp4", ".mkv", ".webm", ".avi", ".mov", ".m4v", ".mpg", ".mpeg", ".flv", ".wmv", ".ts"})
MOST_FRAMES = 32
"""Frames read of a file, as lmms-eval's own models do by default."""


class VideoReadError(VlmpruneError, ValueError):
    """A video file cannot be read."""


@dataclass(frozen=True)
class Video:
    """Frames (frames, height, width, 3), `uint8`, and how many of them make a second."""

    frames: np.ndarray
    fps: float

    def metadata(self) -> dict[str, Any]:
        """What transformers' processors ask about a video whose frames have been chosen."""
        number = len(self.frames)
        return {
            "fps": self.fps,
            "total_num_frames": number,
            "duration": number / self.fps,
            "frames_indices": list(range(number)),
        }


def is_video(visual: Any) -> bool:
    """Whether this is a `Video`, the path of a video file, or frames in memory (`{"frames": pictures, "fps": number}`).

    lmms-eval's wrapping (`{"type": "video", "url": one of these}`) is one too.
    """
    visual = _unwrapped(visual)
    if isinstance(visual, (str, Path)):
        return Path(visual).suffix.lower() in VIDEO_FILES
    return isinstance(visual, Video) or (isinstance(visual, Mapping) and "frames" in visual)


def to_video(visual: Any, frames: int = MOST_FRAMES) -> Video:
    """A video as `is_video` knows it; of a file at most `frames` frames, evenly spaced from the first to the last.

    Raises:
        VideoReadError: the file cannot be read.
        UnsupportedCallError: this is no video.
    """
    visual = _unwrapped(visual)
    if isinstance(visual, Video):
        return visual
    if isinstance(visual, (str, Path)):
        return read_video(str(visual), frames)
    if not isinstance(visual, Mapping) or "frames" not in visual:
        raise UnsupportedCallError(
            f"A video of type {type(visual).__name__!r} is not supported; allowed: the path of a file, or "
            '{"frames": pictures, "fps": frames in a second}.'
        )
    pictures = [np.asarray(_picture(frame)) for frame in visual["frames"]]
    return Video(np.stack(pictures), float(visual.get("fps") or 1.0))


def _unwrapped(visual: Any) -> Any:
    return (
        visual["url"] if isinstance(visual, Mapping) and visual.get("type") == "video" and "url" in visual else visual
    )


@lru_cache(maxsize=4)
def read_video(path: str, frames: int = MOST_FRAMES) -> Video:
    """Read a file with PyAV, which lmms-eval decodes with too.

    Raises:
        VideoReadError: there is no such file, it cannot be decoded, or PyAV is missing.
    """
    try:
        import av
    except ImportError as error:
        raise VideoReadError("Reading video files needs PyAV: pip install 'vlmprune[eval]'") from error
    try:
        with av.open(path) as container:
            stream = container.streams.video[0]
            rate = float(stream.average_rate or 0) or 1.0
            count = stream.frames or sum(1 for _ in container.decode(stream))
            chosen = set(even_frames(count, frames))
            container.seek(0)
            found = [
                frame.to_ndarray(format="rgb24")
                for number, frame in enumerate(container.decode(stream))
                if number in chosen
            ]
    except (OSError, IndexError, av.error.FFmpegError) as error:
        raise VideoReadError(f"The video {path!r} cannot be read: {type(error).__name__}: {error}") from error
    if not found:
        raise VideoReadError(f"The video {path!r} has no frames.")
    return Video(np.stack(found), rate * len(found) / count)


def even_frames(count: int, most: int) -> list[int]:
    """Numbers of at most `most` of `count` frames, evenly spaced, the first and the last among them."""
    number = min(count, most)
    return sorted(set(np.linspace(0, count - 1, number).round().astype(int).tolist())) if number else []


def _picture(frame: Any) -> Image.Image:
    picture = frame if isinstance(frame, Image.Image) else Image.fromarray(np.asarray(frame))
    return picture.convert("RGB")


def processor_arguments(videos: Sequence[Video]) -> dict[str, Any]:
    """Arguments that hand videos, whose frames are all to be used, to a processor; none where there are none."""
    if not videos:
        return {}
    return {
        "videos": [video.frames for video in videos],
        "video_metadata": [video.metadata() for video in videos],
        "do_sample_frames": False,
    }
