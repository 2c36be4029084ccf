"""What a method sees of a prefill, what it may ask of the vision tower, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Literal, NamedTuple, get_args

from torch import Tensor

from vlmprune.layout import VisualLayout

from .first_layer import FirstLayer
from .projector import ProjectorLayers

AttentionKind = Literal[
    "cls_attention", "cls_attention_one_head", "cls_logits", "received_attention", "mean_query_attention"
]
VisionSignalKind = AttentionKind | Literal["keys", "states", "features", "cls_features", "kept_pixels"]

ATTENTION_KINDS: frozenset[str] = frozenset(get_args(AttentionKind))
# Signals for which all tokens ask.
ALL_QUERIES_KINDS: frozenset[str] = frozenset({"received_attention", "mean_query_attention"})
# Signals that have a row a tile and not one a token.
TILE_KINDS: frozenset[str] = frozenset({"cls_features"})
CLS_KINDS: frozenset[str] = frozenset({"cls_attention", "cls_attention_one_head", "cls_logits", "cls_features"})


class VisionSignal(NamedTuple):
    """What a method reads of one vision tower layer; fp32, channels last.

    Attributes:
        kind: what the channels are:
            "cls_attention": softmaxed attention of the CLS query, `[heads]`.
            "cls_logits": the same before the softmax.
            "cls_attention_one_head": the same after it, queries and keys of all heads taken as those of a single head, `[1]`.
            "received_attention": mean over all queries of the softmaxed attention, `[heads]`.
            "mean_query_attention": softmaxed attention of the mean of all queries of a picture or frame, `[heads]`; over the mean
                keys of patches that become one visual token.
            "keys": keys as the attention uses them, rotary positions applied where there are any, `[heads * head_dim]`; of
                patches that become one visual token the mean.
            "states": output of the layer, `[dim]`; of towers that encode equally large tiles.
            "features": what the projector gets, `[patches_per_token * dim]`; `layer` is the feature layer.
            "cls_features": the same of the CLS token, `[dim]`, one row a tile.
            "kept_pixels": whether the method chose the token before the tower, `[1]`; `layer` is 0.
        layer: 0-based index of the encoder layer.
    """

    kind: VisionSignalKind
    layer: int


@dataclass(frozen=True)
class TowerFacts:
    """What a method needs to know of a vision tower to name the layers it asks for.

    Attributes:
        layers: number of encoder layers.
        feature_layer: 0-based index of the layer whose output becomes the visual tokens.
        has_cls: whether token 0 of the tower is a CLS token.
        heads: attention heads of a layer.
        patches_per_token: patches that the tower merges in one visual token.
    """

    layers: int
    feature_layer: int
    has_cls: bool
    heads: int = 1
    patches_per_token: int = 1

    def attention(self, layer: int) -> VisionSignal:
        """Return the CLS attention of a layer, or the attention received from all tokens where there is no CLS token."""
        return VisionSignal("cls_attention" if self.has_cls else "received_attention", layer)


class Instruction(NamedTuple):
    """The text that goes with an image: system prompt, other images and special tokens are left out.

    Attributes:
        ids: int64 `[words]`; None where the call has embeddings in their place.
        embeddings: `[words, dim]`, as they enter the language model.
        following: `[words, dim]`, the same of all text between the image and the next one or the end, special tokens
            included; of all text behind the image where there is none between them, of all text where none is behind it.
    """

    ids: Tensor | None
    embeddings: Tensor
    following: Tensor


@dataclass(frozen=True, eq=False)
class VisualBatch:
    """All images and videos of one prefill, packed one after the other.

    A video is one image here: its frames follow each other, each row by row, so token `i` of a video is in frame
    `i // (rows * columns)`. Newlines behind a video are no tokens of it. A method that goes frame by frame gets each frame
    as an image of its own.

    Attributes:
        features: `[tokens, dim]` visual tokens as they enter the language model, in its dtype; `tokens = sum(counts)`.
        counts: visual tokens per image.
        budgets: visual tokens to keep per image.
        layouts: geometry per image.
        tower: facts of the vision tower.
        vision: per requested signal an fp32 tensor `[tokens, channels]`, 0 at newlines; where the host interpolates the
            visual tokens these are interpolated too.
        tile_vision: per requested signal and image the whole maps of its tiles, padding included, fp32
            `[tiles, tile rows * tile columns, channels]`; for signals with a row a tile, these: `[tiles, channels]`.
        project: the model's projector: turns "features" `[rows, channels]` into values like `features`, `[rows, dim]`.
        projector_layers: gives the projector's weights.
        instructions: the text that goes with each image, for methods that need it.
        embed: embeds token ids `[words]` as the language model does, `[words, dim]`.
        first_layer: the projections of the first decoder layer, for methods that need them.
        questions: for these, per image `[tokens, dim]`, what follows the last image of its prompt up to the end of the turn.
        modalities: "image" or "video" per image; empty where all are images.
        coordinates: fp32 `[tokens, 2]`, mean rotary cosine and sine of each token's position, for `keep_positions`.
    """

    features: Tensor
    counts: tuple[int, ...]
    budgets: tuple[int, ...]
    layouts: tuple[VisualLayout, ...]
    tower: TowerFacts
    vision: Mapping[VisionSignal, Tensor] = field(default_factory=dict)
    tile_vision: Mapping[VisionSignal, tuple[Tensor, ...]] = field(default_factory=dict)
    project: Callable[[Tensor], Tensor] | None = None
    projector_layers: Callable[[], ProjectorLayers] | None = None
    instructions: tuple[Instruction, ...] = ()
    embed: Callable[[Tensor], Tensor] | None = None
    first_layer: FirstLayer | None = None
    questions: tuple[Tensor, ...] = ()
    modalities: tuple[str, ...] = ()
    coordinates: Tensor | None = None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each image in the packed tokens, and the end of the last: `len(counts) + 1` entries."""
        return tuple(accumulate(self.counts, initial=0))


@dataclass(frozen=True, eq=False)
class Selection:
    """The answer of a method.

    Attributes:
        kept: int64 `[sum(counts)]`, per image the indices into its own visual tokens, ascending. Between layers in the order
            in which the rows follow each other, which is another where merged tokens are appended; a merged token is named
            by one of those that it is made of.
        counts: kept tokens per image (host integers, so that nothing waits for the device).
        features: `[sum(counts), dim]` values that replace the kept tokens' own (merging methods), or None.
        merge: how `features` came from the batch's, for values of the same tokens that the model adds later on (DeepStack):
            `[tokens, dim]` to `[sum(counts), dim]`. Without it those of the token whose place a merged token takes are used.
        groups: int64 `[tokens]`, for each visual token the index of the kept token of its image that its value went into, -1
            where it is dropped; None where every kept token has its own value.
        carried: `[sum(counts), channels]`, what the stage before the first layer hands on with each kept token to the one
            between layers, as `LayerBatch.carried`; or None.
        scores: `[tokens]`, what the tokens were ranked by, the best highest, for records and pictures; None where no one number
            decides.
    """

    kept: Tensor
    counts: tuple[int, ...]
    features: Tensor | None = None
    merge: Callable[[Tensor], Tensor] | None = None
    groups: Tensor | None = None
    carried: Tensor | None = None
    scores: Tensor | None = None
