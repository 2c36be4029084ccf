"""What a method needs beyond the tokens and where they lie: one row a need.

`apply`, the sites, the FLOPs, the tables and the tests read the same rows. What a method reads of single layers of the
vision tower is said by `vision_signals`, because it depends on the tower.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from typing import Literal, Protocol

from .batch import TowerFacts


class FamilyFacts(Protocol):
    """The facts of a model family that needs ask for."""

    @property
    def modalities(self) -> tuple[str, ...]:
        """What the model encodes, of "image" and "video"."""

    @property
    def tower_facts(self) -> TowerFacts:
        """Layers of the vision tower, and whether it has a CLS token."""

    @property
    def has_tower_attention(self) -> bool:
        """Whether attention of the vision tower can be read."""

    @property
    def has_tower_blocks(self) -> bool:
        """Whether tokens can be reduced in the blocks of the vision tower."""

    @property
    def has_packed_blocks(self) -> bool:
        """Whether the vision tower packs pictures of any size, and tokens can be reduced in its blocks."""

    @property
    def has_free_order(self) -> bool:
        """Whether every image is one tile, whose visual tokens may be fewer and need no grid."""

    @property
    def has_projector(self) -> bool:
        """Whether what the projector gets can be read, and the projector be run on other rows."""

    @property
    def has_projector_layers(self) -> bool:
        """Whether the projector is two linear layers whose weights are at hand."""

    @property
    def has_first_layer(self) -> bool:
        """Whether queries and keys of the first decoder layer can be read."""

    @property
    def has_decoder_layers(self) -> bool:
        """Whether tokens can be dropped between the decoder layers, and their attention be read."""

    @property
    def has_grid(self) -> bool:
        """Whether every image is one plain grid of tokens."""

    @property
    def has_equal_tiles(self) -> bool:
        """Whether an image is encoded as one or several tiles of one size."""

    @property
    def has_tiles(self) -> bool:
        """Whether images are cut in a thumbnail and crops."""


def _always(*_: object) -> bool:
    return True


@dataclass(frozen=True)
class Need:
    """One thing that a method needs of a model or of a call.

    Attributes:
        name: unique name.
        sentence: what must be there, as in "the method needs ...".
        supplied_by: what supplies it.
        met_by: whether a model can give it, from the facts of its family.
        met_by_call: whether a call can give it, from the modalities ("image", "video") that it holds and the model's family.
    """

    name: str
    sentence: str
    supplied_by: str
    met_by: Callable[[FamilyFacts], bool] = field(default=_always, compare=False)
    met_by_call: Callable[[Collection[str], FamilyFacts], bool] = field(default=_always, compare=False)

    def __repr__(self) -> str:
        return f"<need {self.name}>"


@dataclass(frozen=True, repr=False)
class LayerNeed(Need):
    """What a method reads of the language model at the layer it cuts.

    Attributes:
        probe: whose queries and keys are read: those of the layer at whose input tokens are dropped, or of the one before.
        rows: the queries that count: the row's last prompt token, text behind the images, visual tokens, all tokens, or none.
        keys: whether keys are read; without them only hidden states are.
        values: whether values are read too, of the layer before.
    """

    probe: Literal["cut layer", "layer before"] = "cut layer"
    rows: Literal["last token", "text", "visual", "all tokens", "none"] = "last token"
    keys: bool = True
    values: bool = False
    met_by: Callable[[FamilyFacts], bool] = field(default=lambda family: family.has_decoder_layers, compare=False)


STILL_IMAGES = Need(
    "still_images",
    "images and no videos",
    "the call",
    met_by_call=lambda modalities, family: "video" not in modalities,
)
VIDEOS = Need(
    "videos",
    "videos",
    "the call; images beside them stay whole",
    met_by=lambda family: "video" in family.modalities,
    met_by_call=lambda modalities, family: "video" in modalities,
)
TOWER_ATTENTION = Need(
    "tower_attention",
    "a vision tower whose attention can be read",
    "the hooks on the layers that `vision_signals` names, as `VisualBatch.vision`",
    met_by=lambda family: family.has_tower_attention,
)
TOWER_FEATURES = Need(
    "tower_features",
    "a projector whose input can be read",
    "the hook on the projector, as `VisualBatch.vision` and `VisualBatch.project`",
    met_by=lambda family: family.has_projector,
)
PROJECTOR_LAYERS = Need(
    "projector_layers",
    "a projector of two linear layers whose weights can be read",
    "`VisualBatch.projector_layers`",
    met_by=lambda family: family.has_projector_layers,
)
CLS_TOKEN = Need(
    "cls_token",
    "a CLS token in the vision tower",
    "`TowerFacts.has_cls`",
    met_by=lambda family: family.tower_facts.has_cls,
)
GRID = Need(
    "grid",
    "visual tokens that form one plain grid",
    "`VisualLayout.grid`; frames of videos have one in every family",
    met_by=lambda family: family.has_grid or "video" in family.modalities,
    met_by_call=lambda modalities, family: family.has_grid or "image" not in modalities,
)
WHOLE_TILES = Need(
    "whole_tiles",
    "images encoded in tiles of one size",
    "the signals on whole tiles, padding included, as `VisualBatch.tile_vision`",
    met_by=lambda family: family.has_equal_tiles,
)
PIXELS = Need(
    "pixels",
    "a vision tower over packed patches, which can run on some of them",
    "the hooks on the tower, by `choose_pixels`",
    met_by=lambda family: family.has_packed_blocks,
)
TILES = Need(
    "tiles",
    "images cut in a thumbnail and crops",
    "`VisualLayout.tile` and `VisualLayout.crops`",
    met_by=lambda family: family.has_tiles,
)
TOWER_BLOCKS = Need(
    "tower_blocks",
    "a vision tower over equally large tiles, of blocks with attention and MLP",
    "the hooks on its blocks, as `BlockBatch`",
    met_by=lambda family: family.has_tower_blocks,
)
ANY_TOWER_BLOCKS = Need(
    "any_tower_blocks",
    "a vision tower of blocks with attention and MLP",
    "the hooks on its blocks, as `BlockBatch`, in which a token of a tower over packed pictures is a whole visual token",
    met_by=lambda family: family.has_tower_blocks or family.has_packed_blocks,
)
FREE_ORDER = Need(
    "free_order",
    "for output='merged' one tile an image whose tokens need no grid (output='full' needs none)",
    "one placeholder a merged token, the others dropped at the language model's entry",
    met_by=lambda family: family.has_free_order,
)
INSTRUCTION = Need(
    "instruction",
    "text beside the images",
    "ids and embeddings of the prompt, as `VisualBatch.instructions`",
)
FIRST_LAYER = Need(
    "first_layer",
    "a first decoder layer whose queries and keys can be read",
    "the layer's own modules, as `VisualBatch.first_layer`, and the text behind the images, as `VisualBatch.questions`",
    met_by=lambda family: family.has_first_layer,
)
DECODER_ATTENTION = Need(
    "decoder_attention",
    "decoder layers whose queries, keys and values can be read",
    "hooks on the layers' projections, as the arguments of `AttentionMethod.change`",
    met_by=lambda family: family.has_first_layer,
)
LAST_TOKEN_AT_CUT = LayerNeed(
    "last_token_at_cut",
    "the last prompt token's attention in the layer that is cut",
    "queries and keys projected ahead of the layer, as `LayerBatch.attention`",
)
LAST_TOKEN_BEFORE_CUT = LayerNeed(
    "last_token_before_cut",
    "the last prompt token's attention in the layer before the cut",
    "queries and keys captured in that layer, as `LayerBatch.attention`",
    probe="layer before",
)
ALL_TOKENS_BEFORE_CUT = LayerNeed(
    "all_tokens_before_cut",
    "the attention of all tokens in the layer before the cut",
    "queries and keys captured in that layer, as `LayerBatch.probed`",
    probe="layer before",
    rows="all tokens",
)
TEXT_AT_CUT = LayerNeed(
    "text_at_cut",
    "the attention of the text behind an image in the layer that is cut",
    "queries and keys projected ahead of the layer, as `LayerBatch.attention_of`",
    rows="text",
)
TEXT_BEFORE_CUT = LayerNeed(
    "text_before_cut",
    "the attention of the text behind an image in the layer before the cut",
    "queries and keys captured in that layer, as `LayerBatch.attention_of`",
    probe="layer before",
    rows="text",
)
VISUAL_AT_CUT = LayerNeed(
    "visual_at_cut",
    "the attention of visual tokens in the layer that is cut",
    "queries and keys projected ahead of the layer, as `LayerBatch.attention_of`",
    rows="visual",
)
KEYS_BEFORE_CUT = LayerNeed(
    "keys_before_cut",
    "the keys of the layer before the cut",
    "keys captured in that layer, as `LayerBatch.probed`",
    probe="layer before",
    rows="none",
)
VALUES_BEFORE_CUT = LayerNeed(
    "values_before_cut",
    "the values of the layer before the cut",
    "values captured in that layer, as `ProbedLayer.value`",
    probe="layer before",
    rows="none",
    values=True,
)
HIDDEN_AT_CUT = LayerNeed(
    "hidden_at_cut",
    "the hidden states that enter the layer that is cut",
    "`LayerBatch.hidden`",
    rows="none",
    keys=False,
)

NEEDS: tuple[Need, ...] = (
    STILL_IMAGES,
    VIDEOS,
    TOWER_ATTENTION,
    TOWER_FEATURES,
    PROJECTOR_LAYERS,
    CLS_TOKEN,
    GRID,
    WHOLE_TILES,
    PIXELS,
    TILES,
    TOWER_BLOCKS,
    ANY_TOWER_BLOCKS,
    FREE_ORDER,
    INSTRUCTION,
    FIRST_LAYER,
    DECODER_ATTENTION,
    LAST_TOKEN_AT_CUT,
    LAST_TOKEN_BEFORE_CUT,
    ALL_TOKENS_BEFORE_CUT,
    TEXT_AT_CUT,
    TEXT_BEFORE_CUT,
    VISUAL_AT_CUT,
    KEYS_BEFORE_CUT,
    VALUES_BEFORE_CUT,
    HIDDEN_AT_CUT,
)


def ordered(needs: Collection[Need]) -> list[Need]:
    """Return `needs` in the order of the rows here, those from elsewhere last, by name."""
    rows = {need: row for row, need in enumerate(NEEDS)}
    return sorted(needs, key=lambda need: (rows.get(need, len(rows)), need.name))
