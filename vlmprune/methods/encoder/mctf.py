"""MCTF: fusion of tokens that are similar, get little attention and are small, with the next attention fused along."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_choice, check_flag, check_number
from vlmprune.methods.encoder.mctf_match import (
    Pooling,
    criteria,
    fused,
    pool,
    pool_attention,
    pooling_weights,
    two_way_match,
)
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Place, Reading, Reduction
from vlmprune.methods.shared.tower_attention import attention_received
from vlmprune.methods.shared.tower_plan import blocks_within, check_blocks, leaving

Mode = Literal["one_step_ahead", "precise", "after_block"]


@dataclass(frozen=True, kw_only=True)
class MCTF(EncoderMethod):
    """Fuse r tokens before the attention of every block but the first, half of them from even to odd positions, half back.

    Two tokens are fused by the product of their similarity `((cosine + 1) / 2)`, the reciprocals of the attention that
    they receive in this block, and those of their sizes, each to the power of `1 / tau`. A group becomes its mean by
    attention times size. `mode="one_step_ahead"` needs the block's attention for it and then uses it, fused like the tokens, in
    place of a softmax of its own: the attention matrices are held in memory, flash and SDPA kernels rest in these blocks.
    "precise" reads the received attention only, without the matrices, and lets the block attend to the fused tokens as it
    always does. "after_block" fuses behind the block, by its attention. Attention counts a token by its size.
    All pairs are compared, and "one_step_ahead" multiplies attention matrices with the map of the groups: at half of the tokens
    of a CLIP-L/336 tower this took what it saved on a CPU in bf16 (0.95 times as fast as unpatched, 1.2 times in fp32).
    The CLS token never fuses. All in fp32; equal scores go to the lowest index, where the official code leaves them open.

    Source: "Multi-criteria Token Fusion with One-step-ahead Attention for Efficient Vision Transformers", arXiv 2403.10030,
    for DeiT, fine-tuned and training-free; no figures with a language model exist. The paper writes exponents tau, the official
    code takes `1 / tau`, as here. Its evaluation is r 16 in blocks 1 to 11 of 12 with 1, 20 and 40; a "fast" setting is
    `MCTF(r=0.35, layers=(3, 6, 9))`. There never less than 10 tokens stay, here so only if `r` says how many go.

    Attributes:
        r: how many tokens go in each of `layers`, or their share below 1, instead of `keep`; 16 if neither is given.
        layers: 0-based blocks; all but block 0 if not given.
        mode: as above.
        tau_sim: root of the similarity; 0 leaves it out, as for the following.
        tau_info: root of the reciprocal attention.
        tau_size: root of the reciprocal size.
        bidirectional: whether half of them go from odd to even positions.
        pooling: "attention" for attention times size, "size", "mean", or "max" for the largest value of every feature.
    """

    r: float | None = None
    layers: tuple[int, ...] | None = None
    mode: Mode = "one_step_ahead"
    tau_sim: float = 1.0
    tau_info: float = 20.0
    tau_size: float = 40.0
    bidirectional: bool = True
    pooling: Pooling = "attention"

    name: ClassVar[str] = "mctf"
    symbols: ClassVar[Mapping[str, str]] = {
        "r_student": "r=",
        "one_step_ahead": "mode='one_step_ahead' (1), 'precise' (2) or 'after_block' (0)",
        "bidirection": "bidirectional=",
        "pooling_type": "pooling='size' (0), 'attention' (1), 'max' (2) or 'mean' (3)",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None and self.r is None:
            object.__setattr__(self, "r", 16)
        if self.r is not None:
            if self.keep is not None:
                raise ParameterError(f"keep={self.keep!r} and r={self.r!r} both say how many tokens fuse; give one.")
            check_number("r", self.r, "[0, inf)", "a number of tokens, or a share below 1")
        if self.layers is not None:
            object.__setattr__(self, "layers", check_blocks("layers", self.layers))
        check_choice("mode", self.mode, get_args(Mode))
        for name in ("tau_sim", "tau_info", "tau_size"):
            check_number(name, getattr(self, name), "[0, inf)")
        check_flag("bidirectional", self.bidirectional)
        check_choice("pooling", self.pooling, get_args(Pooling))

    @property
    def place(self) -> Place:
        """By `mode`."""
        return "after block" if self.mode == "after_block" else "before attention"

    @property
    def reads(self) -> frozenset[Reading]:
        """Queries and keys."""
        return frozenset({"keys", "queries"})

    @property
    def proportional(self) -> bool:
        """Attention counts tokens by size."""
        return True

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return what leaves each block."""
        blocks = tower.feature_layer + 1
        layers = (
            range(min(1, blocks - 1), blocks) if self.layers is None else blocks_within("layers", self.layers, blocks)
        )
        if self.r is None:
            assert self.keep is not None
            return leaving(self.keep, self.output == "merged", patches, blocks, merging=layers)
        leaves = []
        for block in range(blocks):
            if block in layers:
                patches -= fused(patches + tower.has_cls, self.r, int(tower.has_cls))
            leaves.append(patches)
        return tuple(leaves)

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Fuse `batch.remove` tokens of every tile."""
        attention = batch.attention if self.mode == "one_step_ahead" else None
        received = attention_received(batch) if attention is None else attention.mean((1, 2))
        taus = {name: getattr(self, name) for name in ("tau_sim", "tau_info", "tau_size")}
        scores = criteria(batch.hidden, received, batch.sizes, **taus)
        match = two_way_match(scores, batch.remove, batch.leading, self.bidirectional)
        weights, outputs = pooling_weights(received, batch.sizes, self.pooling), match.places.shape[1]
        sizes = torch.ones_like(received) if batch.sizes is None else batch.sizes
        return Reduction(
            values=pool(batch.hidden, weights, match.groups, outputs, self.pooling),
            groups=match.groups,
            targets=match.places,
            sizes=sizes.new_zeros(len(sizes), outputs).scatter_add_(1, match.groups, sizes),
            attention=None if attention is None else pool_attention(attention, weights, match.groups, outputs),
        )

    def reduction_macs(self, shape: BlockShape) -> int:
        """Cosines of even with odd tokens, the attention, its fusion, and its product with the values, which replaces the own."""
        odd = shape.tokens // 2
        total = ((shape.tokens - odd) * odd + shape.tokens * shape.tokens) * shape.dim
        if self.mode == "one_step_ahead":
            total += shape.heads * shape.outputs * shape.tokens * (shape.tokens + shape.outputs)
            total += shape.outputs * shape.outputs * shape.dim
        return total
