"""The base of every method: a frozen dataclass with one selecting function on tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from ..budget import Keep, check_keep, token_budget
from .batch import Selection, TowerFacts, VisionSignal, VisualBatch

Site = Literal["input", "layer"]


@dataclass(frozen=True, kw_only=True)
class Method:
    """A way to reduce the visual tokens of a prefill.

    Attributes:
        keep: share of visual tokens kept, a float in (0, 1], or the number kept per image, an int.
        videos: whether the method selects among the tokens of a video (a class attribute).
    """

    keep: Keep = 0.25

    name: ClassVar[str]
    site: ClassVar[Site] = "input"
    merges: ClassVar[bool] = False
    needs_cls: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = False
    needs_tiles: ClassVar[bool] = False
    videos: ClassVar[bool] = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "keep", check_keep(self.keep))

    def budget(self, total: int) -> int:
        """Return how many of `total` visual tokens of one image are kept."""
        return token_budget(self.keep, total)

    def parts(self) -> tuple[Method, ...]:
        """Return the stages of a method that acts at several sites; itself by default."""
        return (self,)

    def vision_signals(self, tower: TowerFacts) -> tuple[VisionSignal, ...]:
        """Return the vision tower attention that `select` reads; nothing by default."""
        return ()

    def select(self, batch: VisualBatch) -> Selection:
        """Choose the tokens of every image in `batch`; called once a prefill, and only if something is to be dropped."""
        raise NotImplementedError(f"{type(self).__name__} does not select at the input of the language model.")
