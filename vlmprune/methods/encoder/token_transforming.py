"""A soft merge after the idea of Token Transforming: every output is a mixture of all tokens. A reconstruction."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from vlmprune.errors import ParameterError
from vlmprune.methods.batch import TowerFacts
from vlmprune.methods.checks import check_choice, check_flag, check_int, check_number
from vlmprune.methods.encoder.token_transforming_matrix import soft_merge, top_targets, transformation
from vlmprune.methods.encoder_method import BlockBatch, BlockShape, EncoderMethod, Reading, Reduction
from vlmprune.methods.shared.tower_attention import attention_given, attention_received
from vlmprune.methods.shared.tower_plan import all_but_one, blocks_within, check_blocks, leaving, spread_blocks

# No official setting is known: a quarter, half and three quarters of the tower.
DEPTHS = (1 / 4, 1 / 2, 3 / 4)


@dataclass(frozen=True, kw_only=True)
class TokenTransforming(EncoderMethod):
    """Replace the tokens by soft merges around the most important ones, between attention and MLP of some blocks.

    A reconstruction, not the published method: all that is certain of it is that tokens are multiplied by a matrix W made of
    the tokens themselves, in which every token may feed several outputs. Importance, temperature, normalisation and blocks
    are our reading, and no figure of the paper is claimed for it.

    Here targets are the tokens with the most attention (that of the CLS token; received from all without one), mean over heads,
    and every token shares its size out over them by the softmax of its cosines over `tau` (`mode="mass"`; sizes still
    sum to the number of tokens), or every target mixes all tokens by a softmax with the logarithm of their sizes ("row").
    CLS passes. Outputs stand in the order of their targets. With `output="full"` every token gets back the mixture of
    the outputs that it fed. All in fp32.

    Source: "Token Transforming: A Unified and Training-Free Token Compression Framework for Vision Transformer Acceleration",
    arXiv 2506.05709, whose repository holds no code.

    Attributes:
        layers: 0-based blocks that merge; three, at a quarter, half and three quarters of the tower, if not given.
        tau: temperature of the cosines.
        mode: "mass" or "row".
        targets_a_token: how many targets a token feeds, the most similar; all if not given.
        proportional_attention: whether attention counts a token by its size.
    """

    layers: tuple[int, ...] | None = None
    tau: float = 0.1
    mode: Literal["mass", "row"] = "mass"
    targets_a_token: int | None = None
    proportional_attention: bool = True

    name: ClassVar[str] = "token_transforming"
    symbols: ClassVar[Mapping[str, str]] = {"top_k": "targets_a_token="}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is None:
            object.__setattr__(self, "keep", 0.75 if self.output == "full" else 0.5)
        if self.layers is not None:
            object.__setattr__(self, "layers", check_blocks("layers", self.layers))
        check_number("tau", self.tau, "(0, inf)")
        check_choice("mode", self.mode, ("mass", "row"))
        if self.targets_a_token is not None:
            check_int("targets_a_token", self.targets_a_token, 1)
            if self.mode == "row":
                raise ParameterError(f"targets_a_token={self.targets_a_token} needs mode='mass'.")
        check_flag("proportional_attention", self.proportional_attention)

    @property
    def reads(self) -> frozenset[Reading]:
        """Queries and keys."""
        return frozenset({"keys", "queries"})

    @property
    def proportional(self) -> bool:
        """By `proportional_attention`."""
        return self.proportional_attention

    def plan(self, patches: int, tower: TowerFacts) -> tuple[int, ...]:
        """Return what leaves each block: the same share goes in each of `layers`."""
        assert self.keep is not None
        blocks = tower.feature_layer + 1
        layers = spread_blocks(DEPTHS, tower) if self.layers is None else blocks_within("layers", self.layers, blocks)
        merged = self.output == "merged"
        return leaving(self.keep, merged, patches, blocks, merging=layers, by="share", limit=all_but_one)

    def reduce(self, batch: BlockBatch) -> Reduction:
        """Merge the tokens of every tile into `batch.remove` fewer."""
        first, class_token = batch.leading, batch.leading > 0
        score = attention_given(batch, 0) if class_token else attention_received(batch)
        targets = top_targets(score, batch.patches - batch.remove, class_token)
        matrix = transformation(
            batch.hidden, batch.sizes, targets, self.tau, self.mode, self.targets_a_token, class_token=class_token
        )
        values, sizes = soft_merge(batch.hidden, batch.sizes, matrix, self.mode, class_token)
        own = torch.arange(first, device=targets.device).expand(len(targets), -1)
        back = (matrix / matrix.sum(1, keepdim=True)).transpose(1, 2)

        def restore(later: Tensor) -> Tensor:
            return torch.cat([later[:, :first], (back @ later[:, first:].float()).to(later.dtype)], 1)

        return Reduction(
            values,
            groups=torch.cat([own, matrix.argmax(1) + first], 1),
            targets=torch.cat([own, targets], 1),
            sizes=sizes,
            restore=restore,
        )

    def reduction_macs(self, shape: BlockShape) -> int:
        """The cosines and the merge, and the attention of the scores."""
        queries = 1 if shape.leading else shape.tokens
        return 2 * self.restoring_macs(shape) + queries * shape.tokens * shape.dim

    def restoring_macs(self, shape: BlockShape) -> int:
        """The transposed matrix."""
        return (shape.tokens - shape.leading) * (shape.outputs - shape.leading) * shape.dim
