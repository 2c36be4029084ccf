"""VisionDrop: visual attention alone decides, in the vision tower and in stages of the language model."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from vlmprune.budget import token_budget
from vlmprune.methods.base import Method
from vlmprune.methods.input.visionzip import VisionZip
from vlmprune.methods.layer.visiondrop_stages import ENTRY, VisionDropStages
from vlmprune.methods.needs import STILL_IMAGES, Need


@dataclass(frozen=True, kw_only=True)
class VisionDrop(VisionZip):
    """Keep tokens by visual attention, and merge the others into a few: before the first layer, and inside the language model.

    The stage of the tower is `VisionZip` with one contextual token of eight, the CLS token among the dominant ones where there
    is one; the stages of the language model are `VisionDropStages`. `keep` is the average over all layers: 1.5 times as many
    enter, as far as there are so many, and the counts of the stages are solved for the average in the proportions of the
    published script. `VisionDrop(keep=32)` is that script on 576 tokens and 32 layers: 42 + 6 enter, and 30 + 5, 22 + 4 and
    16 + 3 are left from layers 8, 16 and 24 on. The paper's lists for 64, 128 and 192 are not published.

    Positions: with 1-D positions the gaps close before the first layer and at every stage, and a new token's position in a
    layer is the length of its cache, as in the official code; M-RoPE ids, for which there is none, stay those of the full prompt.

    Source: "Rethinking Visual Token Reduction in LVLMs under Cross-modal Misalignment", AAAI 2026, arXiv 2506.22283. The paper
    speaks of attention among visual tokens; the code, as here, takes the softmax over the whole sequence up to the token. The
    paper fuses merged tokens; the code adds the target and the mean of the others, as here. The official counts are absolute,
    for one image of 576 tokens; here they follow `keep` and the image, and each image has its own queries. Dominant and
    contextual tokens enter in position order; the official one, contextual tokens last, is `order="official"`. Without a CLS
    token the received attention scores, as the paper says; no code does that.

    Attributes:
        layers: 0-based layers at whose input tokens are dropped, three; by default a quarter, a half and three quarters.
    """

    contextual: float = 6 / 48
    layers: tuple[int, ...] | None = None

    name: ClassVar[str] = "visiondrop"
    needs: ClassVar[frozenset[Need]] = VisionZip.needs | {STILL_IMAGES}
    symbols: ClassVar[Mapping[str, str]] = {"layer_list": "layers="}

    def __post_init__(self) -> None:
        super().__post_init__()
        self.parts()

    def parts(self) -> tuple[Method, ...]:
        """Return this first stage and those inside the language model, unless nothing is to be dropped."""
        inner = VisionDropStages(keep=self.keep, layers=self.layers)
        return (self,) if self.keep == 1.0 and isinstance(self.keep, float) else (self, inner)

    def budget(self, total: int) -> int:
        """Return how many of `total` visual tokens enter the language model."""
        if isinstance(self.keep, float):
            return total if self.keep == 1.0 else token_budget(min(1.0, ENTRY * self.keep), total)
        return min(total, round(ENTRY * self.keep))
