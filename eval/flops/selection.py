"""Cost of choosing the tokens, counted from shapes in the same way as the model: products of vectors and matrices.

A method pays for the attention that it reads where the model does not hand it out (one product of queries and keys; the
projections are the tower's or language model's own), and for its own arithmetic on features. Means over heads, softmax, sorting
and the running maxima of greedy methods are left out, as norms and activations are elsewhere.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedConfig

from vlmprune.methods.attention_method import AttentionMethod
from vlmprune.methods.base import Method
from vlmprune.methods.batch import ATTENTION_KINDS
from vlmprune.methods.encoder_method import BlockShape, EncoderMethod
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.layer_method import LayerMethod
from vlmprune.methods.selection_macs import FirstLayerWork, Scored, ScoredLayers
from vlmprune.patches.families.facts import tower_width

from .families import vision_cost
from .language import LanguageShape
from .vision_work import VisionWork


def selection_macs(
    config: PreTrainedConfig,
    method: Method,
    work: VisionWork,
    images: Sequence[tuple[int, int]],
    visual_tokens: Sequence[int],
    text_tokens: int,
) -> int | None:
    """MACs of choosing for one request; the arguments are those of `request_cost`.

    None where a method does not say what it computes (`InputMethod.feature_macs`, `LayerMethod.own_macs`): its cost is not
    known, which is not the same as none.
    """
    total, encoder = 0, encoder_part(method)
    if encoder is not None and encoder.output == "merged":
        # What acts behind it chooses among the tokens that are left.
        family = vision_cost(config)
        left = max(
            (encoder.plan_of_grid(grid, family.facts(config))[-1] for _, grid in family.tiles(config, work)), default=0
        )
        images = [(min(before, left), kept) for before, kept in images]
    for part in method.parts():
        macs: int | None = 0
        if isinstance(part, EncoderMethod):
            macs = _encoder_macs(config, part, work)
        elif isinstance(part, AttentionMethod):
            macs = attention_macs(config, part, [n + text_tokens for n in visual_tokens], visual_tokens, text_tokens)
        elif isinstance(part, LayerMethod):
            macs = _layer_macs(config, part, [n + text_tokens for n in visual_tokens], text_tokens)
        elif isinstance(part, InputMethod) and any(kept < before for before, kept in images):
            macs = _input_macs(config, part, work, images, text_tokens)
        if macs is None:
            return None
        total += macs
    return total


def encoder_part(method: Method | None) -> EncoderMethod | None:
    """Return the stage of a method that reduces tokens in the vision tower, or None."""
    parts = () if method is None else method.parts()
    return next((part for part in parts if isinstance(part, EncoderMethod)), None)


def _encoder_macs(config: PreTrainedConfig, method: EncoderMethod, work: VisionWork) -> int | None:
    """Reductions of all tiles, what gives values back to all patches, and projections of what is read before an attention.

    Values are given back behind the block that makes the features, and behind the last one, which the host reads too.
    """
    family, hidden, total = vision_cost(config), tower_width(config), 0
    facts = family.facts(config)
    unit = family.unit(config)
    restored = {facts.feature_layer, facts.layers - 1}
    for tiles, grid in family.tiles(config, work):
        before = grid[0] * grid[1]
        for block, after in enumerate(method.plan_of_grid(grid, facts)):
            if after < before:
                more = int(facts.has_cls) + method.trailing(facts)
                shape = BlockShape(
                    before + more,
                    after + more,
                    unit * hidden,
                    unit * facts.heads,
                    int(facts.has_cls),
                    block=block,
                    layers=facts.layers,
                )
                own = method.reduction_macs(shape)
                if own is None:
                    return None
                total += tiles * (own + method.restoring_macs(shape) * len(restored))
                if method.place == "before attention":
                    total += tiles * len(method.reads) * (before + more) * hidden * hidden
            before = after
    return total


def attention_macs(
    config: PreTrainedConfig, method: AttentionMethod, tokens: Sequence[int], visual_tokens: Sequence[int], rows: int
) -> int:
    """MACs of changing the attention of `rows` queries in a call whose layers hold `tokens`; all text of a prefill counts."""
    shape = LanguageShape.from_config(config)
    width = shape.heads * shape.head_dim
    return sum(
        method.change_macs(rows, tokens[layer], visual_tokens[layer], width)
        for layer in method.changed_layers(shape.layers)
    )


def _input_macs(
    config: PreTrainedConfig,
    method: InputMethod,
    work: VisionWork,
    images: Sequence[tuple[int, int]],
    text_tokens: int,
) -> int | None:
    family = vision_cost(config)
    facts = family.facts(config)
    hidden = tower_width(config)
    total = 0
    for signal in method.vision_signals(facts):
        if signal.kind not in ATTENTION_KINDS:
            continue
        lengths = family.segments(config, work, signal.layer)
        if signal.kind == "received_attention":
            pairs = sum(length * length for length in lengths)
        elif signal.kind == "mean_query_attention":
            pairs = sum(lengths) // facts.patches_per_token
        else:
            pairs = sum(lengths)
        total += pairs * hidden
    # Of towers that take any size each picture is one, and each frame of a video.
    tiles = max(1, (work.crops or sum(frames for frames, _, _ in work.grids)) // max(1, len(images)))
    shape = LanguageShape.from_config(config)
    scored = Scored(
        images,
        dim=config.get_text_config().hidden_size,
        has_cls=facts.has_cls,
        tower_dim=hidden,
        tiles=tiles,
        head_dim=hidden // facts.heads,
        projector=family.projector(config),
        projector_hidden=family.projector_hidden(config),
        first_layer=FirstLayerWork(text_tokens, shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim),
    )
    own = method.feature_macs(scored)
    return None if own is None else total + own


def _layer_macs(config: PreTrainedConfig, method: LayerMethod, tokens: Sequence[int], text_tokens: int) -> int | None:
    """Attention of the queries that a method reads with all keys of the layer.

    A method that probes the layer it cuts projects the keys of the tokens it drops too, and of all that it merges; those of the
    others are that layer's own. Of a method that reads all tokens or the text the rows of all text count, though text before the
    first picture is not read.
    """
    shape = LanguageShape.from_config(config)
    width = shape.heads * shape.head_dim
    visual = [count - text_tokens for count in tokens]
    scored = ScoredLayers(visual, text_tokens, shape.hidden, shape.heads, shape.kv_heads, shape.head_dim)
    total = method.own_macs(scored)
    if total is None:
        return None
    for cut in method.cut_layers(shape.layers):
        before, after = tokens[cut - 1], tokens[cut]
        need = method.reading_at(cut, shape.layers)
        rows = {"last token": 1, "text": text_tokens, "visual": visual[cut - 1], "all tokens": text_tokens, "none": 0}
        if need.rows != "all tokens" and after >= before:
            continue
        total += rows[need.rows] * before * width
        if need.probe == "cut layer" and need.keys:
            projected_again = before if method.merges else before - after
            total += shape.hidden * (rows[need.rows] * width + projected_again * shape.kv_heads * shape.head_dim)
    for signal in method.layer_signals(shape.layers):
        if signal.kind == "last_token_attention":
            total += tokens[signal.layer] * width
    return total
