"""Input methods that choose among the tokens of a picture, and how they serve videos."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from .checks import check_choice
from .input_method import InputMethod


@dataclass(frozen=True, kw_only=True)
class PictureMethod(InputMethod):
    """An input method made for pictures that serves videos too, frame by frame or the video as one picture.

    Attributes:
        per: "frame" chooses in every frame of a video as in an image, with an even share of the video's budget (the larger
            shares evenly spaced, and only evenly spaced frames where the budget is below one token a frame); "video" chooses
            among the tokens of all frames at once. Images are served alike by both.
    """

    per: Literal["frame", "video"] = "frame"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("per", self.per, ("frame", "video"))

    @property
    def frame_by_frame(self) -> bool:
        """Whether `per` is "frame"."""
        return self.per == "frame"
