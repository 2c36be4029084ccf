"""What a method sees of the language model at a cut between its layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import Any, Literal, NamedTuple

from torch import Tensor

from vlmprune.kernels.chosen_attention import chosen_attention
from vlmprune.layout import VisualLayout

from .batch import VisionSignal


class LayerSignal(NamedTuple):
    """One value a token that a method reads in a layer before the cut; it goes through the cuts in between.

    Attributes:
        kind: "last_token_attention": the softmaxed attention of the row's last prompt token, mean over heads; "attention" or
            "mlp": what `LayerMethod.observe` makes of that module's input and output.
        layer: 0-based layer.
    """

    kind: Literal["last_token_attention", "attention", "mlp"]
    layer: int


class TextSpans(NamedTuple):
    """The text around an image: columns of its row, int64, ascending; padding, drafts and visual tokens are in none.

    Attributes:
        before: between the image before it, or the start of the row, and this image.
        next: between this image and the one after it, or the end of the prompt.
        after: all text behind the image.
    """

    before: Tensor
    next: Tensor
    after: Tensor


class EntryEmbeddings(NamedTuple):
    """What entered the language model.

    Attributes:
        visual: `[entered, dim]`, the image's visual tokens.
        text: `[text, dim]`, the text behind it, as `TextSpans.after` has it.
    """

    visual: Tensor
    text: Tensor


@dataclass(frozen=True, eq=False)
class ProbedLayer:
    """Queries and keys of the probed layer, rotary positions applied unless said otherwise.

    Attributes:
        query: `[batch, tokens, heads, head_dim]`; None where a method reads only some rows, see `queries`.
        key: `[batch, keys, kv_heads, head_dim]`; the last `tokens` of the `keys` belong to this call, others to earlier turns.
        kinds: int8 `[batch, keys]`: 0 padding, 1 before the first visual token (or an earlier turn), 2 visual, 3 text after
            it; None where a method reads only some rows.
        scale: factor of the logits.
        valid: bool `[batch, keys]`, False at padding and drafts; None if there is none.
        key_states: `[batch, tokens, kv_heads * head_dim]`, keys as projected, neither normalised nor rotated.
        value: `[batch, tokens, kv_heads, head_dim]`, for a method that asks for them.
        inverse_frequencies: fp32 `[head_dim / 2]` of the rotary positions.
    """

    query: Tensor | None
    key: Tensor
    kinds: Tensor | None
    scale: float
    valid: Tensor | None = None
    key_states: Tensor | None = None
    value: Tensor | None = None
    inverse_frequencies: Tensor | None = None
    read_queries: Callable[[int, Tensor], Tensor] | None = None
    read_positions: Callable[[], Tensor] | None = None
    read_counted_key: Callable[[], Tensor] | None = None
    read_rotation: Callable[[Tensor], Tensor] | None = None

    def queries(self, row: int, columns: Tensor) -> Tensor:
        """Return the rotated queries of a row's `columns`, `[columns, heads, head_dim]`; only these are projected."""
        if self.query is not None:
            return self.query[row, columns]
        if self.read_queries is None:
            raise RuntimeError("The method's `LayerNeed` does not read queries of this layer.")
        return self.read_queries(row, columns)

    @cached_property
    def positions(self) -> Tensor:
        """Position ids of the probed layer, int64 `[..., batch, tokens]`; padding before a row's first token does not count."""
        if self.read_positions is None:
            raise RuntimeError("There are no positions.")
        return self.read_positions()

    @cached_property
    def counted_key(self) -> Tensor:
        """Keys of this call's tokens, rotated at `positions`: `[batch, tokens, kv_heads, head_dim]`.

        What depends on absolute positions is the same in a padded batch as alone with these, and not always with `key`: a plain
        forward counts padding on the left too.
        """
        return self.key if self.read_counted_key is None else self.read_counted_key()

    def rotate(self, states: Tensor) -> Tensor:
        """Apply the layer's rotary positions to `states [batch, tokens, heads, head_dim]`."""
        if self.read_rotation is None:
            raise RuntimeError("There are no rotary positions.")
        return self.read_rotation(states)


@dataclass(frozen=True, eq=False)
class LayerBatch:
    """The visual tokens alive in the images that are cut at one layer, packed one after the other.

    Columns are those of the sequence as it is before the cut. Tuples are aligned with `counts`.

    Attributes:
        layer: 0-based layer at whose input the tokens are dropped.
        counts: visual tokens alive per image.
        budgets: visual tokens to keep per image; None where the method decides from the scores.
        rows: batch row per image.
        attention: fp32 `[tokens]`, softmaxed attention of the row's last prompt token, averaged over heads;
            `tokens = sum(counts)`.
        probed: queries and keys of the probed layer.
        layers: layers of the language model.
        images: number of each image in the prompt.
        totals: visual tokens per image before anything was dropped.
        entered: visual tokens per image that entered the first layer.
        layouts: geometry of each image before anything was dropped; `indices` are places in it.
        indices: per image int64 `[counts[i]]`, the alive tokens as indices into the image's own order.
        columns: per image int64 `[counts[i]]`, the columns of its alive tokens.
        text: the text around each image.
        hidden: `[batch, width, dim]`, what enters the layer that is cut: the output of the one before.
        valid: bool `[batch, width]`, False at padding; None if there is none.
        signals: fp32 `[tokens]` per signal of `LayerMethod.layer_signals` in a layer before the cut.
        vision: fp32 `[tokens, channels]` per signal of `LayerMethod.vision_signals`.
        carried: `[tokens, channels]`, what the method's input stage handed on as `Selection.carried`, or None.
        memory: the method's own, from the first cut of a prefill to its end.
    """

    layer: int
    counts: tuple[int, ...]
    budgets: tuple[int | None, ...]
    rows: tuple[int, ...]
    attention: Tensor | None = None
    probed: ProbedLayer | None = None
    layers: int = 0
    images: tuple[int, ...] = ()
    totals: tuple[int, ...] = ()
    entered: tuple[int, ...] = ()
    layouts: tuple[VisualLayout, ...] = ()
    indices: tuple[Tensor, ...] = ()
    columns: tuple[Tensor, ...] = ()
    text: tuple[TextSpans, ...] = ()
    hidden: Tensor | None = None
    valid: Tensor | None = None
    signals: Mapping[LayerSignal, Tensor] = field(default_factory=dict)
    vision: Mapping[VisionSignal, Tensor] = field(default_factory=dict)
    carried: Tensor | None = None
    memory: dict[Any, Any] = field(default_factory=dict)
    read_entry: Callable[[], tuple[EntryEmbeddings, ...]] | None = None
    final_norm: Callable[[Tensor], Tensor] | None = None

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Start of each image in the packed tokens, and the end of the last: `len(counts) + 1` entries."""
        return tuple(accumulate(self.counts, initial=0))

    @cached_property
    def entry(self) -> tuple[EntryEmbeddings, ...]:
        """What entered the language model, per image."""
        if self.read_entry is None:
            raise RuntimeError("The embeddings that entered the language model are not at hand.")
        return self.read_entry()

    def normalize(self, hidden: Tensor) -> Tensor:
        """Apply the language model's final norm."""
        if self.final_norm is None:
            raise RuntimeError("The final norm is not at hand.")
        return self.final_norm(hidden)

    def attention_of(
        self,
        queries: Sequence[Tensor],
        reduce_heads: Literal["mean", "none"] = "mean",
        reduce_queries: Literal["none", "mean", "sum"] = "none",
    ) -> tuple[Tensor, ...]:
        """Return the softmaxed attention that columns of each image's row pay to its alive tokens, fp32.

        The softmax is causal and runs over the whole row, earlier turns included; only the asked rows are computed.

        Args:
            queries: int64 `[queries]` per image, columns of its row.
            reduce_heads: "mean" over heads, or "none".
            reduce_queries: "none", or the "mean" or "sum" over the queries.

        Returns:
            Per image `[queries, counts[i]]`, `[queries, heads, counts[i]]` with all heads, without `queries` if reduced.
        """
        probed = self.probed
        if probed is None or self.hidden is None:
            raise RuntimeError("The method's `LayerNeed` does not read attention of this layer.")
        past = probed.key.shape[1] - self.hidden.shape[1]
        return tuple(
            chosen_attention(
                probed.queries(row, asked),
                probed.key[row],
                columns + past,
                last=asked + past,
                valid=None if probed.valid is None else probed.valid[row],
                scale=probed.scale,
                reduce_heads=reduce_heads,
                reduce_queries=reduce_queries,
            )
            for row, asked, columns in zip(self.rows, queries, self.columns, strict=True)
        )
