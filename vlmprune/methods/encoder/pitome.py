"""PiToMe: merges of the tokens that stand in crowds, block after block; tokens that stand alone are protected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import ceil
from typing import ClassVar, Literal, get_args

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_choice, check_number
from vlmprune.methods.encoder.pitome_energy import Variant, energy_groups, energy_match, merged_away
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Place, Reading, Reduction
from vlmprune.methods.shared.merged_tokens import merge_tokens
from vlmprune.methods.shared.tower_attention import mean_keys
from vlmprune.methods.shared.tower_plan import leaving

Schedule = Literal["llava", "pitome", "bsm_pitome", "bsm", "text", "deit", "mae"]

# The share of a tower's blocks that the official code for LLaVA merges as ToMe does: blocks 0 to 12 of 24.
LLAVA_BSM = 13 / 24


@dataclass(frozen=True, kw_only=True)
class PiToMe(EncoderMethod):
    """Merge in every block the tokens with the highest energy, the mean over all tokens of `ELU(cosine - margin)`.

    Of the 2r highest, every other one in their order merges into the most similar of the rest; all others are protected. The
    margin falls from block to block, `margin * (1 - block / layers)`. The official code for LLaVA merges behind whole blocks by
    their outputs, in the first 13 of 24 blocks as ToMe does (`schedule="llava"`, other towers in proportion), takes plain means
    and carries no sizes. Those are the defaults; merged tokens stand in the order of the tokens they merged into, in the
    official code by energy (`order="official"`). The CLS token never merges. Similarities and means are fp32; equal values
    go to the lowest index, where the official code leaves them open.

    `keep` is met exactly, by the same ratio in all blocks and here and there one token more.

    Source: "Accelerating Transformers with Spectrum-Preserving Token Merging", arXiv 2405.16148. In the paper the energy keeps
    the cosine itself above the margin; the official code and this one subtract the margin there too. The paper speaks of
    proportional attention, the official code has none, nor has this one. Its tables for LLaVA-1.5 use ratios of 0.9 and more:
    0.9 leaves 54 of 576 tokens, 0.95 leaves 183, 0.975 leaves 330.

    Attributes:
        ratio: share of a block's tokens that stays, 0.5 to 1, instead of `keep`; 0.95 if neither is given.
        margin: that of block 0; officially 0.9 for LLaVA and BLIP, 0.95 for CLIP, 0.75 for DeiT and MAE.
        alpha: how deep the energy falls below the margin.
        schedule: "pitome", "bsm" (ToMe's split by even and odd positions), "bsm_pitome" (even and odd ranks of all energies)
            or "text" (a Gaussian energy, the r highest into the next r) in all blocks; "llava"; "deit" ("bsm_pitome" in the
            first half, then "pitome") or "mae" ("pitome", then "bsm_pitome").
        after: "block" for merges behind whole blocks (LLaVA), "attention" for merges before the MLP (DeiT, CLIP, BLIP).
        metric: "hidden" for the tokens themselves (LLaVA, CLIP, BLIP), "keys" for the mean of the block's keys (DeiT).
        weights: "mean" for plain means, "size" for means by the number of tokens that each stands for.
    """

    ratio: float | None = None
    margin: float = 0.9
    alpha: float = 1.0
    schedule: Schedule = "llava"
    after: Literal["block", "attention"] = "block"
    metric: Literal["hidden", "keys"] = "hidden"
    weights: Literal["mean", "size"] = "mean"

    name: ClassVar[str] = "pitome"
    symbols: ClassVar[Mapping[str, str]] = {
        "use_bsm": "schedule='bsm'",
        "use_bsm_pitome": "schedule='bsm_pitome'",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None and self.ratio is None:
            object.__setattr__(self, "ratio", 0.95)
        if self.ratio is not None:
            if self.keep is not None:
                raise ParameterError(
                    f"keep={self.keep!r} and ratio={self.ratio!r} both say how many tokens merge; give one."
                )
            check_number("ratio", self.ratio, "[0.5, 1]", "the share of a block's tokens that stays")
        check_number("margin", self.margin, "[-1, 1)" if self.schedule == "text" else "[-1, 1]", "a cosine")
        check_number("alpha", self.alpha, "[0, inf)")
        check_choice("schedule", self.schedule, get_args(Schedule))
        check_choice("after", self.after, ("block", "attention"))
        check_choice("metric", self.metric, ("hidden", "keys"))
        check_choice("weights", self.weights, ("mean", "size"))

    @property
    def place(self) -> Place:
        """By `after`."""
        return "after block" if self.after == "block" else "after attention"

    @property
    def reads(self) -> frozenset[Reading]:
        """Keys, if they are compared."""
        return frozenset({"keys"} if self.metric == "keys" else ())

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return what leaves each block at `ratio`, counted as the official code does, or at the ratio that meets `keep`."""
        blocks = tower.feature_layer + 1
        if self.ratio is None:
            assert self.keep is not None
            return leaving(self.keep, self.output == "merged", patches, blocks, by="share")
        leaves = []
        for block in range(blocks):
            variant = self.variant(block, tower.layers)
            patches -= merged_away(patches + tower.has_cls, self.ratio, variant, tower.has_cls)
            leaves.append(patches)
        return tuple(leaves)

    def variant(self, block: int, layers: int) -> Variant:
        """Return how a block of a tower of `layers` blocks matches."""
        if self.schedule == "llava":
            return "bsm" if block < ceil(LLAVA_BSM * layers) else "pitome"
        if self.schedule in ("deit", "mae"):
            first = block < ceil(layers / 2)
            return "bsm_pitome" if first == (self.schedule == "deit") else "pitome"
        return self.schedule  # type: ignore[return-value]

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Merge `batch.remove` tokens of every tile."""
        layers, class_token = batch.tower.layers, batch.leading > 0
        match = energy_match(
            mean_keys(batch) if self.metric == "keys" else batch.hidden,
            batch.remove,
            self.margin - self.margin * batch.block / layers,
            variant=self.variant(batch.block, layers),
            class_token=class_token,
            alpha=self.alpha,
        )
        groups, targets = energy_groups(match, class_token)
        sizes = batch.sizes if self.weights == "size" else None
        values, sums = merge_tokens(batch.hidden, groups, sizes, targets.shape[1])
        return Reduction(values, groups, targets, sizes=sums if self.weights == "size" else None)

    def reduction_macs(self, shape: BlockShape) -> int:
        """The cosines of all tokens with all, but for "bsm", and of those that may merge with those they may merge into."""
        width = shape.dim // shape.heads if self.metric == "keys" else shape.dim
        variant, r = self.variant(shape.block, shape.layers), shape.tokens - shape.outputs
        if variant == "bsm":
            return (shape.tokens - shape.tokens // 2) * (shape.tokens // 2) * width
        patches = shape.tokens - shape.leading
        pairs = r * r if variant != "bsm_pitome" else (patches - patches // 2) * (patches // 2)
        return (patches * patches + pairs) * width
