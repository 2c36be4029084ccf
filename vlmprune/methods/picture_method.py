"""Input methods that choose among the tokens of a picture, and how they serve videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_choice
from .input_method import InputMethod


@dataclass(frozen=True, kw_only=True)
class PictureMethod(InputMethod):
    """An input method made for pictures, which serves videos frame by frame.

    In every frame of a video it chooses as in an image of its own, with an even share of the video's budget: the larger
    shares are evenly spaced, and where the budget is below one token a frame, evenly spaced frames get one.
    """

    @property
    def frame_by_frame(self) -> bool:
        """True: a video is so many pictures."""
        return True


@dataclass(frozen=True, kw_only=True)
class FrameOrVideoMethod(PictureMethod):
    """A method for pictures that can also choose among the tokens of all frames at once.

    Attributes:
        per: "frame" for an even share of the budget in every frame of a video, "video" for the best tokens of all frames,
            wherever they are. Images are served alike by both.
    """

    per: Literal["frame", "video"] = "frame"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("per", self.per, ("frame", "video"))

    @property
    def frame_by_frame(self) -> bool:
        """Whether `per` is "frame"."""
        return self.per == "frame"
