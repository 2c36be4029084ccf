"""What arithmetic on features costs, counted from shapes as products of vectors and matrices (multiply-accumulates).

Means over heads, softmax, sorting and the running maxima of greedy methods are left out, as norms and activations are
elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class FirstLayerWork:
    """Widths of the first decoder layer.

    Attributes:
        text_tokens: text of the prompt.
        query_width: width of its queries, all heads together.
        key_width: width of its keys, all heads together.
    """

    text_tokens: int = 1
    query_width: int = 1
    key_width: int = 1


@dataclass(frozen=True)
class Scored:
    """What an input method chooses from.

    Attributes:
        images: visual tokens before and after, of every image.
        dim: width of the features.
        has_cls: whether the vision tower has a CLS token.
        tower_dim: width of the vision tower.
        tiles: tiles an image.
        head_dim: width of an attention head of the vision tower.
        projector: multiply-accumulates of the projector for one visual token.
        projector_hidden: width between the projector's two layers.
        first_layer: the first decoder layer.
    """

    images: Sequence[tuple[int, int]]
    dim: int
    has_cls: bool
    tower_dim: int = 1
    tiles: int = 1
    head_dim: int = 1
    projector: int = 0
    projector_hidden: int = 0
    first_layer: FirstLayerWork = FirstLayerWork()


@dataclass(frozen=True)
class ScoredLayers:
    """What a method inside the language model chooses from.

    Attributes:
        visual: visual tokens that each layer sees.
        text: text tokens.
        dim: width of the hidden states.
        heads: attention heads.
        kv_heads: heads of keys and values.
        head_dim: width of a head.
    """

    visual: Sequence[int]
    text: int
    dim: int
    heads: int = 1
    kv_heads: int = 1
    head_dim: int = 1


def all_pairs_macs(scored: Scored) -> int:
    """Return the cost of the cosines of all pairs, from which the first pick is found and every later one is read."""
    return sum(total * total * scored.dim for total, kept in scored.images if kept < total)


def picked_rows_macs(scored: Scored) -> int:
    """Return the cost of the cosines of the picks with all tokens; of all pairs where that many make the matrix cheaper."""
    return sum(
        (total if 16 * kept > total else kept) * total * scored.dim for total, kept in scored.images if kept < total
    )


def pairs_in_tiles_macs(scored: Scored) -> int:
    """Return the cost of the cosines of all pairs of a tile's features before the projector, tokens spread evenly over tiles."""
    return sum(total * total // scored.tiles * scored.tower_dim for total, kept in scored.images if kept < total)


def one_cosine_macs(scored: Scored) -> int:
    """Return the cost of one cosine a token."""
    return sum(total * scored.dim for total, kept in scored.images if kept < total)
