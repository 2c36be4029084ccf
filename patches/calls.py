"""What belongs to the running calls of a patched model, kept per thread."""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from vlmprune.errors import UnsupportedCallError
from vlmprune.record import RunRecord

if TYPE_CHECKING:
    from .attention.run import AttentionRun
    from .cache.state import PrunedCacheState
    from .layers.continued import ContinuedLayers
    from .layers.run import LayerRun
    from .prefill.compaction import Compaction
    from .prefill.host_masks import HostMasks

PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}
"""The argument that has what is encoded, by modality."""


@dataclass(eq=False)
class TowerCall:
    """One run of the vision tower: what the hooks of a tower reader captured.

    Attributes:
        captured: by what it is ("q_proj", say) and layer.
        reduction: what an encoder method makes of the tokens in this run, a `TowerReduction` or, of a packed tower, a
            `PackedReduction`; None where there is none, or it has nothing to do.
        modality: "image" or "video", what is encoded.
    """

    captured: dict[tuple[str, int], Any] = field(default_factory=dict)
    reduction: Any = None
    modality: str = "image"


@dataclass(eq=False)
class ModelCall:
    """One running forward of the multimodal model.

    Attributes:
        inputs: the arguments of the call by name.
        visual_mask: bool `[batch, tokens]` on the CPU, true at the placeholders of visual tokens; None where there are none.
        attention_mask: the caller's 2-D mask as bool on the CPU, or None.
        encoded: per modality what the encoder returned, with the projected features per image in `pooler_output`.
        modality_masks: like `visual_mask`, per modality.
        direct: whether the caller called the language model itself, with these arguments.
        language_call: the call of the language model inside it, once that has begun.
    """

    inputs: Mapping[str, Any]
    direct: bool = False
    visual_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    encoded: dict[str, Any] = field(default_factory=dict)
    modality_masks: dict[str, Tensor] = field(default_factory=dict)
    language_call: LanguageModelCall | None = None

    @property
    def has_visuals(self) -> bool:
        """Whether images or videos are put into this call."""
        return bool(self.encoded) and self.visual_mask is not None

    def read_mask(self, mask: Any) -> None:
        """Keep a copy of a 2-D attention mask on the CPU."""
        if isinstance(mask, Tensor) and mask.ndim == 2:
            self.attention_mask = mask.bool().cpu()


@dataclass(eq=False)
class LanguageModelCall:
    """One call of the language model: its arguments, read once at the entry, and what the exit must know of it.

    Attributes:
        model_call: the forward around it.
        arguments: the keyword arguments that the host passed, in the caller's columns.
        state: what earlier prefills left behind with the cache, or None.
        entry: how the sequence was compacted before the first layer, or None.
        left_behind: what later calls with the same cache must know, or None.
        layer_run: the running sequence of a prefill where it differs from layer to layer, or None.
        continued_layers: what the layers are given where it differs and nothing is dropped any more, or None.
        attention_run: what changes in its attention, or None.
        record: what a prefill kept before the first layer.
        drafts: how many of the last tokens are drafts of assisted decoding, which no method may look at.
        host_masks: what the host made of the caller's mask, where it does not pass that on.
    """

    model_call: ModelCall
    arguments: dict[str, Any]
    state: PrunedCacheState | None = None
    entry: Compaction | None = None
    left_behind: PrunedCacheState | None = None
    layer_run: LayerRun | None = None
    continued_layers: ContinuedLayers | None = None
    attention_run: AttentionRun | None = None
    record: RunRecord | None = None
    drafts: int = 0
    host_masks: HostMasks | None = None

    @cached_property
    def tokens(self) -> Tensor:
        """Embeddings `[batch, columns, dim]`, or ids `[batch, columns]` where no embeddings were given."""
        embeddings = self.arguments.get("inputs_embeds")
        tokens: Tensor = embeddings if embeddings is not None else self.arguments["input_ids"]
        return tokens

    @property
    def batch(self) -> int:
        """Rows of the call."""
        return self.tokens.shape[0]

    @property
    def columns(self) -> int:
        """Tokens per row of the call, padding included."""
        return self.tokens.shape[1]

    @property
    def device(self) -> torch.device:
        """Where the tokens are."""
        return self.tokens.device

    @property
    def cache(self) -> Any:
        """The KV cache, or None."""
        return self.arguments.get("past_key_values")

    @cached_property
    def past(self) -> int:
        """Entries of the first layer's cache before this call."""
        return 0 if self.cache is None else int(self.cache.get_seq_length())

    @cached_property
    def caller_past(self) -> int:
        """Tokens of the caller's sequence before this call."""
        return self.past if self.state is None else self.state.caller_past(self.cache)

    @cached_property
    def later_tokens(self) -> tuple[Tensor | None, int]:
        """What a pruned cache's state calls so."""
        assert self.state is not None
        return self.state.later_tokens(self.caller_past, self.mask, self.columns)

    @property
    def mask(self) -> Any:
        """The attention mask as the host passed it; see `check_mask`."""
        return self.arguments.get("attention_mask")

    def check_mask(self) -> None:
        """Raise UnsupportedCallError unless the attention mask is `[batch, tokens]` or missing."""
        mask = self.mask
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            kind = f"{mask.ndim}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedCallError(
                f"attention_mask is a {kind}; a pruned call needs a 2-D mask [batch, tokens] or none. "
                "A mask that you made yourself cannot be pruned; `generate` passes a 2-D mask for static caches too."
            )

    def check_positions(self) -> None:
        """Raise UnsupportedCallError if the caller gave positions that the pruned cache already stands for."""
        if self.state is not None and self.model_call.inputs.get("position_ids") is not None:
            mask = self.mask if isinstance(self.mask, Tensor) and self.mask.ndim == 2 else None
            self.state.check_positions(self.caller_past, self.positions, mask)

    @cached_property
    def visual(self) -> Tensor:
        """Bool `[batch, columns]` on the CPU, true at visual tokens."""
        seen = self.model_call.visual_mask
        return torch.zeros(self.batch, self.columns, dtype=torch.bool) if seen is None else seen

    @cached_property
    def valid(self) -> Tensor:
        """Bool `[batch, columns]` on the CPU, false at the padding of this call's tokens."""
        mask = self.model_call.attention_mask
        return torch.ones_like(self.visual) if mask is None else mask[:, -self.columns :]

    @cached_property
    def text(self) -> Tensor:
        """Bool `[batch, columns]` on the CPU, valid tokens that are not visual."""
        return self.valid & ~self.visual

    @cached_property
    def positions(self) -> Tensor:
        """Position ids `[..., batch, columns]` of this call's tokens in the caller's sequence, int64."""
        given = self.arguments.get("position_ids")
        if given is None:
            given = torch.arange(self.caller_past, self.caller_past + self.columns, device=self.device)[None]
        elif self.model_call.inputs.get("position_ids") is None:
            # Made by the multimodal model (M-RoPE), of the whole mask where there is one.
            given = given[..., -self.columns :]
        if given.ndim > 1 and given.shape[-2] == self.batch:
            return given
        leading = given.shape[:-2] if given.ndim > 1 else ()
        return given.expand(*leading, self.batch, self.columns)


class CallStack(threading.local):
    """The running calls of one patched model in the current thread, innermost last."""

    def __init__(self) -> None:
        self.model: list[ModelCall] = []
        self.tower: list[TowerCall] = []

    @property
    def language_call(self) -> LanguageModelCall | None:
        """The running call of the language model, or None."""
        return self.model[-1].language_call if self.model else None

    @property
    def continued_layers(self) -> ContinuedLayers | None:
        """Those of the running call of the language model, or None."""
        call = self.model[-1].language_call if self.model else None
        return None if call is None else call.continued_layers

    def __deepcopy__(self, memo: dict[int, Any]) -> CallStack:
        return CallStack()

    def __reduce__(self) -> tuple[type[CallStack], tuple[()]]:
        return CallStack, ()
