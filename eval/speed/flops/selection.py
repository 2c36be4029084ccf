"""Cost of choosing the tokens, counted from shapes in the same way as the model: products of vectors and matrices.

A method pays for the attention that it reads where the model does not hand it out (one product of queries and keys; the
projections are the tower's or language model's own), and for its own arithmetic on features. Means over heads, softmax, sorting
and the running maxima of greedy methods are left out, as norms and activations are elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from vlmprune.methods.base import Method
from vlmprune.methods.batch import ATTENTION_KINDS
from vlmprune.methods.input.holov import HoloV
from vlmprune.methods.input.textmonkey import BLOCK
from vlmprune.methods.layer_method import LayerMethod

from .families import vision_family
from .language import LanguageShape
from .vision_work import VisionWork


@dataclass(frozen=True)
class Scored:
    """What an input method chooses from: (visual tokens before, after) of every image, widths, tiles an image."""

    images: Sequence[tuple[int, int]]
    dim: int
    has_cls: bool
    tower_dim: int
    tiles: int


def _nothing(method: Method, scored: Scored) -> int:
    return 0


def _all_pairs(method: Method, scored: Scored) -> int:
    """Cosines of all pairs, from which the first pick is found and every later one is read."""
    return sum(total * total * scored.dim for total, kept in scored.images if kept < total)


def _from_a_pivot(method: Method, scored: Scored) -> int:
    """Cosines of the picks with all tokens; all pairs where that many picks make the whole matrix cheaper."""
    return sum(
        (total if 16 * kept > total else kept) * total * scored.dim for total, kept in scored.images if kept < total
    )


def _tile_means(method: Method, scored: Scored) -> int:
    """Cosine of each token with the mean of its tile, where there is no CLS token."""
    return 0 if scored.has_cls else sum(total * scored.dim for total, kept in scored.images if kept < total)


def _pairs_in_runs(method: Method, scored: Scored) -> int:
    """Cosines of all pairs inside every run, shorter runs filled up to the longest."""
    assert isinstance(method, HoloV)
    total = 0
    for tokens, kept in scored.images:
        if kept < tokens:
            runs = method.number_of_runs(tokens, kept)
            total += runs * (-(-tokens // runs)) ** 2 * scored.dim
    return total


def _pairs_in_tiles(method: Method, scored: Scored) -> int:
    """Cosines of all pairs of a tile's features in the vision tower, the tokens spread evenly over the tiles."""
    return sum(total * total // scored.tiles * scored.tower_dim for total, kept in scored.images if kept < total)


def _later_pairs(method: Method, scored: Scored) -> int:
    """Cosines of each token with those behind the beginning of its block, up to the last."""
    total = 0
    for tokens, kept in scored.images:
        if kept < tokens:
            blocks = [(first, min(BLOCK, tokens - first)) for first in range(0, tokens, BLOCK)]
            total += sum(rows * (tokens - first) for first, rows in blocks) * scored.dim
    return total


FEATURE_MACS: dict[str, Callable[[Method, Scored], int]] = {
    "random": _nothing,
    "uniform": _nothing,
    "pool": _nothing,
    "fastervlm": _nothing,
    "vtc_cls": _nothing,
    "hired": _nothing,
    "globalcom2": _tile_means,
    "divprune": _all_pairs,
    "todre": _from_a_pivot,
    "hiprune": _nothing,
    "holov": _pairs_in_runs,
    "textmonkey": _later_pairs,
    "vispruner": _pairs_in_tiles,
}
"""Arithmetic on features by method name; methods inside the language model have none."""


def selection_macs(
    config: PreTrainedConfig,
    method: Method,
    work: VisionWork,
    images: Sequence[tuple[int, int]],
    visual_tokens: Sequence[int],
    text_tokens: int,
) -> int:
    """MACs of choosing for one request; the arguments are those of `request_cost`."""
    total = 0
    for part in method.parts():
        if isinstance(part, LayerMethod):
            total += _layer_macs(config, part, [n + text_tokens for n in visual_tokens], text_tokens)
        elif any(kept < before for before, kept in images):
            total += _input_macs(config, part, work, images)
    return total


def _input_macs(config: PreTrainedConfig, method: Method, work: VisionWork, images: Sequence[tuple[int, int]]) -> int:
    family = vision_family(config)
    facts = family.facts(config)
    vision = config.vision_config
    hidden = getattr(vision, "embed_dim", None) or vision.hidden_size
    total = 0
    for signal in method.vision_signals(facts):
        if signal.kind not in ATTENTION_KINDS:
            continue
        lengths = family.segments(config, work, signal.layer)
        queries = sum(length * length if signal.kind == "received_attention" else length for length in lengths)
        total += queries * hidden
    tiles = max(1, work.crops // max(1, len(images)))
    scored = Scored(images, config.get_text_config().hidden_size, facts.has_cls, hidden, tiles)
    return total + FEATURE_MACS.get(method.name, _nothing)(method, scored)


def _layer_macs(config: PreTrainedConfig, method: LayerMethod, tokens: Sequence[int], text_tokens: int) -> int:
    """Attention of the queries that a method reads with all keys of the layer.

    A method that probes the layer it cuts projects the keys of the tokens it drops too; those of the others are that layer's own.
    Of a method that reads all tokens the rows of all text count, though text before the first picture is not read.
    """
    shape = LanguageShape.from_config(config)
    width = shape.heads * shape.head_dim
    total = 0
    for cut in method.cut_layers(shape.layers):
        before, after = tokens[cut - 1], tokens[cut]
        if method.reads == "all tokens":
            total += text_tokens * before * width
        elif after < before:
            total += before * width
            if method.probe == "cut layer":
                total += shape.hidden * (width + (before - after) * shape.kv_heads * shape.head_dim)
    return total
