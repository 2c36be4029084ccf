"""The base of the methods that select or merge visual tokens before the first layer of the language model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from ..budget import Keep, check_keep, token_budget
from .base import Method, Site
from .batch import Selection, TowerFacts, VisionSignal, VisualBatch
from .selection_macs import Scored


@dataclass(frozen=True, kw_only=True)
class InputMethod(Method):
    """A method that selects or merges visual tokens before the first layer.

    Positions: with 1-D rotary positions kept tokens and everything after them close the gaps, as in the official codes for
    LLaVA; M-RoPE ids stay those of the full prompt. `apply(..., positions=)` overrides.

    Attributes:
        keep: share of visual tokens kept, a float in (0, 1], or the number kept per image, an int.
        keep_positions: whether two fifths of what is kept are the tokens that carry position, by the rule of `IVCPrune`, and
            the method chooses the others. Positions are then "original" unless `apply(..., positions=)` says otherwise.
    """

    keep: Keep = 0.25
    keep_positions: bool = False

    site: ClassVar[Site] = "input"

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))

    def budget(self, total: int) -> int:
        """Return how many of `total` visual tokens of one image are kept."""
        return token_budget(self.keep, total)

    def kept_count(self, total: int, grid: tuple[int, int] | None = None) -> int | None:
        """Return how many tokens `select` keeps of an image, before it is encoded; None where the image decides.

        Args:
            total: visual tokens of the image.
            grid: its rows and columns, where its tokens are one plain raster.
        """
        return self.budget(total)

    def video_budget(self, frames: int, frame_tokens: int) -> int:
        """Return how many tokens of one video of `frames` times `frame_tokens` are kept, newlines not counted."""
        return self.budget(frames * frame_tokens)

    def check_video(self, frames: int, rows: int, columns: int) -> None:
        """Raise LayoutError unless the method can choose among `frames` frames of `rows` x `columns` tokens; all pass by default.

        Asked of every video of a call, if something is to be dropped.
        """

    @property
    def frame_by_frame(self) -> bool:
        """Whether `select` gets each frame of a video as an image of its own, with an even share of the video's budget."""
        return False

    def with_budgets(self) -> InputMethod:
        """Return the method so that `select` meets the budgets of its batch, where it would decide by itself otherwise."""
        return self

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Return the vision tower attention that `select` reads; nothing by default."""
        return ()

    def choose_pixels(self, pixels: Tensor, grids: list[tuple[int, int]]) -> Tensor:
        """Choose the visual tokens that the vision tower sees, of a method with the need "pixels"; `select` keeps the same.

        Args:
            pixels: fp32 `[tokens, values]` in [0, 1], what each visual token shows, image after image, row by row.
            grids: rows and columns of each image.

        Returns:
            Bool `[tokens]`, one token of every image at least.
        """
        raise NotImplementedError

    def select(self, batch: VisualBatch) -> Selection:
        """Choose the tokens of every image in `batch`; called once a prefill, and only if something is to be dropped."""
        raise NotImplementedError

    def feature_macs(self, scored: Scored) -> int | None:
        """Return the multiply-accumulates of `select` on features, those of its signals apart; None if nobody declared them."""
        return None
