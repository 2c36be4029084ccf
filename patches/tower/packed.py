"""Attention of towers that encode images of any size as packed sequences, without a CLS token (Qwen2-VL and later)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers.vision_utils import get_vision_window_index

from vlmprune.errors import UnsupportedMethodError
from vlmprune.kernels.received_attention import received_attention
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.batch import CLS_KINDS, VisionSignal

from ..calls import CallStack, TowerCall
from .reader import TowerReader

if TYPE_CHECKING:
    from ..families.family import Family
    from ..hooks import HookSet


# The second is Pixtral's, whose module has no decoder.
_ROTARY_FUNCTIONS = ("apply_rotary_pos_emb_vision", "apply_rotary_pos_emb")


class PackedAttention(NamedTuple):
    """What the attention of one layer was computed from.

    Attributes:
        query: `[patches, heads, head_dim]`, rotary positions applied.
        key: the same.
        cu_seqlens: `[sequences + 1]`, the bounds inside which patches attend to each other.
        max_seqlen: the longest of these, or None.
        scale: factor of the logits.
    """

    query: Tensor
    key: Tensor
    cu_seqlens: Tensor
    max_seqlen: int | None
    scale: float


class PackedTowerReader(TowerReader):
    """Reads the fused `qkv` projection, the rotary tables and the sequence bounds of a layer.

    The score of a patch is the attention it receives: the mean of its softmaxed attention over all queries of its
    sequence, which is one image or one video frame. Patches that the tower merges in one visual token are averaged, their
    features put side by side.
    """

    def __init__(self) -> None:
        super().__init__()
        self.heads = 1
        self.merged_patches = 1
        self.layers: dict[int, nn.Module] = {}

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register hooks on the attention of every layer, and on the merger.

        Raises:
            UnsupportedMethodError: a signal needs a CLS token, or the attention has no rotary positions.
        """
        super().install(family, signals, calls, hooks)
        self.heads = family.vision_heads
        tower: Any = family.vision_tower
        self.merged_patches = self.patches_of_a_token(family)
        for signal in signals:
            if signal.kind in CLS_KINDS or signal.kind == "states":
                raise UnsupportedMethodError(
                    f"{type(tower).__name__} has no CLS token, so there is no {signal.kind!r}; allowed: "
                    "'received_attention', 'mean_query_attention', 'keys', 'features'."
                )
            if signal.kind not in ("features", "kept_pixels"):
                self.layers[signal.layer] = family.vision_attention(signal.layer)
        for layer, attention in sorted(self.layers.items()):
            self.watch_attention(layer, attention, hooks)

    def watch_attention(self, layer: int, attention: nn.Module, hooks: HookSet) -> None:
        """Register the hooks on the attention of one layer, from which `packed_attention` reads.

        Raises:
            UnsupportedMethodError: the attention has no rotary positions.
        """
        if _rotary_function(attention) is None:
            raise UnsupportedMethodError(
                f"The module of {type(attention).__name__} has no `{_ROTARY_FUNCTIONS[0]}`, so it cannot be read."
            )
        hooks.before(f"vision layer {layer} bounds", attention, partial(self._keep_arguments, layer))
        hooks.after(f"vision layer {layer} qkv", hooks.child(attention, "qkv"), partial(self._keep_projection, layer))

    def packed_attention(self, layer: int, call: TowerCall) -> PackedAttention:
        """Return what the attention of one layer was computed from."""
        attention: Any = self.layers[layer]
        arguments = call.captured["arguments", layer]
        projected = call.captured["qkv", layer].detach()
        query, key, _ = projected.view(projected.shape[0], 3, self.heads, -1).unbind(1)
        query, key = self.rotated(attention, query, key, *arguments["position_embeddings"])
        return PackedAttention(query, key, arguments["cu_seqlens"], arguments.get("max_seqlen"), attention.scaling)

    def patches_of_a_token(self, family: Family) -> int:
        """Return how many patches become one visual token."""
        tower: Any = family.vision_tower
        return int(tower.spatial_merge_size) ** 2

    def read(self, signal: VisionSignal, call: TowerCall) -> Tensor:
        """Return `[visual tokens, channels]`, raster order in each image or frame, images one after the other."""
        if signal.kind == "kept_pixels":
            return call.captured[signal]
        if signal.kind == "features":
            features = self.patch_features(call).float()
            return self.raster_order(features.reshape(-1, self.merged_patches * features.shape[-1]), call)
        query, key, cu_seqlens, max_seqlen, scale = self.packed_attention(signal.layer, call)
        if signal.kind == "keys":
            return self.raster_order(key.float().flatten(1).unflatten(0, (-1, self.merged_patches)).mean(1), call)
        if signal.kind == "mean_query_attention":
            keys = key.float().unflatten(0, (-1, self.merged_patches)).mean(1)
            bounds: list[int] = cu_seqlens.tolist()
            given = [
                row_attention(
                    query[begin:end].float().mean(0)[None, None],
                    keys[begin // self.merged_patches : end // self.merged_patches][None],
                    scale=scale,
                )[0, 0].T
                for begin, end in pairwise(bounds)
            ]
            return self.raster_order(torch.cat(given), call)
        received = received_attention(
            query,
            key,
            cu_seqlens,
            scale=scale,
            reduce_heads="none",
            max_seqlen=max_seqlen,
        )
        return self.raster_order(received.view(-1, self.merged_patches, self.heads).mean(1), call)

    def rotated(
        self, attention: nn.Module, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Norm, where there are norms, and rotate queries and keys `[patches, heads, head_dim]` as a layer does."""
        if hasattr(attention, "q_norm"):
            query, key = attention.q_norm(query), attention.k_norm(key)  # type: ignore[operator]
        function: Any = _rotary_function(attention)
        if function.__name__ == _ROTARY_FUNCTIONS[0]:
            return function(query, key, cos, sin)
        query, key = function(query.transpose(0, 1)[None], key.transpose(0, 1)[None], cos, sin, unsqueeze_dim=0)
        return query[0].transpose(0, 1), key[0].transpose(0, 1)

    def patch_features(self, call: TowerCall) -> Tensor:
        """Return what the projector gets, `[patches, dim]`, patches of a visual token together."""
        return call.captured["projector input", 0].detach()

    def raster_order(self, tokens: Tensor, call: TowerCall) -> Tensor:
        """Put `[visual tokens, channels]` from the order of the tower's layers in raster order."""
        return tokens

    def _keep_arguments(self, layer: int, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            names = ("position_embeddings", "cu_seqlens", "max_seqlen")
            call = self.calls.tower[-1]
            given = kwargs if call.reduction is None else call.reduction.read_arguments()
            call.captured["arguments", layer] = {name: given.get(name) for name in names}

    def _keep_projection(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        if self.calls.tower:
            call = self.calls.tower[-1]
            # As many rows as a token stands for, so that each of them gets its share of the token's attention.
            call.captured["qkv", layer] = output if call.reduction is None else call.reduction.read_projection()


class ConvolvedTowerReader(PackedTowerReader):
    """The same for a tower in which a convolution merges the patches of a visual token (GLM-4V)."""

    def patch_features(self, call: TowerCall) -> Tensor:
        """Return what the convolution gets, `[patches, dim]`, patches of a visual token together."""
        # [visual tokens, dim, rows, columns].
        return call.captured["projector input", 0].detach().flatten(2).transpose(1, 2).flatten(0, 1)


class WindowedTowerReader(PackedTowerReader):
    """The same for a tower that sorts its patches by window (Qwen2.5-VL).

    Most layers attend inside windows only. There the mean is over the queries of the window, so every window shares out
    the same total whatever its size, and the tokens of small windows at the border score higher. Layers with full
    attention score as in an unwindowed tower.
    """

    def install(self, family: Family, signals: Sequence[VisionSignal], calls: CallStack, hooks: HookSet) -> None:
        """Register hooks on the tower and on the attention of every layer."""
        super().install(family, signals, calls, hooks)
        hooks.before("vision windows", family.vision_tower, self._keep_order)

    def raster_order(self, tokens: Tensor, call: TowerCall) -> Tensor:
        """Undo the order by windows."""
        order = call.captured["window_index", 0].to(tokens.device, non_blocking=True)
        return torch.empty_like(tokens).index_copy_(0, order, tokens)

    def _keep_order(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if self.calls.tower:
            self.calls.tower[-1].captured["window_index", 0] = window_order(module, args, kwargs)


def window_order(tower: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor:
    """Return the raster place of the visual token at each place of a windowed tower's order, by the arguments of its call."""
    # Callers may bring both along; the host then takes theirs.
    order: Tensor | None = kwargs.get("window_index") if kwargs.get("cu_window_seqlens") is not None else None
    if order is None:
        grid = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        order, _ = get_vision_window_index(grid, tower.spatial_merge_size, tower.window_size, tower.patch_size)
    return order


def _rotary_function(attention: nn.Module) -> Callable[..., tuple[Tensor, Tensor]] | None:
    for cls in type(attention).__mro__:
        for name in _ROTARY_FUNCTIONS:
            function = getattr(sys.modules.get(cls.__module__), name, None)
            if function is not None:
                return function
    return None
