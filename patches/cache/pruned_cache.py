"""A cache that knows it was pruned: its own class with the host's class behind it."""

from __future__ import annotations

from functools import cache
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from vlmprune.errors import UnsupportedCallError

from .lengths import entries
from .state import PrunedCacheState

_STATE = "_vlmprune_state"
_RUNNING = "_vlmprune_running"
_PREPARED = "_vlmprune_prepared"
_TRUSTED = "_vlmprune_trusted"
_MEASURED = "_vlmprune_measured"


class PrunedCache:
    """What a cache becomes once a prefill has left fewer entries in it than the prompt has tokens.

    Outside of a patched model's forward it speaks of the caller's sequence: `get_seq_length` counts the caller's tokens, `crop`
    takes the caller's tokens away (each layer loses those of its entries that stand for them), rows are reordered, selected
    and repeated together with what is known of them, `reset` makes it an ordinary cache again. Nothing but a patched model
    can put keys and values in it: anything else raises UnsupportedCallError. Copies and pickles stay pruned. What a layer
    holds is `cache.layers[layer].keys`.
    """

    _vlmprune_running = False
    _vlmprune_prepared = False

    @property
    def is_prepared(self) -> bool:
        """Whether mask and positions of the next call are those of the cache's entries already."""
        return self._vlmprune_prepared

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        # Hosts that gather the outputs of replicas build a new object of this class, whose state is lost.
        self._vlmprune_running = True
        super().__init__(*args, **kwargs)
        self._vlmprune_running = False

    def get_seq_length(self, *args: Any, **kwargs: Any) -> Any:
        """Return the number of tokens of the caller's sequence; inside a patched forward, the layer's entries."""
        state = None if self._vlmprune_running else self.__dict__.get(_STATE)
        if state is None:
            return super().get_seq_length(*args, **kwargs)  # type: ignore[misc]
        return entries(self) + (state.caller_length - state.cache_length)

    def get_mask_sizes(self, *args: Any, **kwargs: Any) -> Any:
        """Return what the host makes masks from; only inside a patched forward."""
        if self._vlmprune_running:
            return super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]
        if _MEASURED not in self.__dict__:
            self._refuse()
        # For a mask of the caller's sequence, which is made anew once it is known what the layers hold.
        state, (length, offset) = self._known(), super().get_mask_sizes(*args, **kwargs)  # type: ignore[misc]
        more = state.caller_length - state.cache_length
        layer = kwargs.get("layer_idx", args[1] if len(args) > 1 else 0)
        sliding = getattr(self.layers[layer], "is_sliding", False)  # type: ignore[attr-defined]
        return (length, offset + more) if sliding else (length + more, offset)

    def update(self, *args: Any, **kwargs: Any) -> Any:
        """Add keys and values of one layer; only inside a patched forward."""
        if not self._vlmprune_running:
            self._refuse()
        return super().update(*args, **kwargs)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the last tokens of the caller's sequence away, as the host's cache does; their number is negative.

        Raises:
            UnsupportedCallError: layers of this kind cannot be shortened.
        """
        state, layers = self._known(), self.layers  # type: ignore[attr-defined]
        if tokens_to_remove > 0:
            # An empty layer says whether this version of the host still takes a length here.
            DynamicLayer().crop(tokens_to_remove)
            tokens_to_remove = min(0, tokens_to_remove - state.caller_past(self))
        if tokens_to_remove == 0:
            super().crop(0)  # type: ignore[misc]
            return
        if not all(layer.is_croppable and not hasattr(layer, "_quantized_keys") for layer in layers):
            raise UnsupportedCallError(
                f"A {type(self).__name__} pruned by {state.method!r} cannot be cropped: its layers "
                f"({', '.join(sorted({type(layer).__name__ for layer in layers}))}) do not give entries back. "
                "Use the default dynamic cache, or start with a fresh one."
            )
        sliding = [layer for layer in layers if getattr(layer, "is_sliding", False)]
        slid = [layer for layer in sliding if layer.get_seq_length() >= layer.sliding_window]
        if not all(getattr(layer, "record_past", False) for layer in slid):
            raise UnsupportedCallError(
                f"A {type(self).__name__} pruned by {state.method!r} cannot be cropped: the windows of {len(slid)} of its layers "
                "are full, and what they forgot is gone. Call `activate_past_recording()` on a cache before the prefill, or "
                "start with a fresh one."
            )
        state.check_entries(self)
        left = state.caller_past(self) + tokens_to_remove
        if left >= state.caller_length:
            super().crop(tokens_to_remove)  # type: ignore[misc]
            return
        if left <= 0:
            for layer in filter(_has_entries, layers):
                layer.crop(-int(layer.get_seq_length()))
            self._forget()
            return
        shorter = state.cropped(left)
        for index, layer in enumerate(layers):
            if not _has_entries(layer):
                continue
            layer.crop(shorter.group(index).cache_length - int(layer.get_seq_length()))
        self.__dict__[_STATE] = shorter

    def reset(self) -> None:
        """Empty the cache; it is an ordinary one again."""
        super().reset()  # type: ignore[misc]
        for layer in self.layers:  # type: ignore[attr-defined]
            # Older hosts leave dynamic layers at their length, full of zeros.
            if isinstance(layer, DynamicLayer) and layer.get_seq_length():
                layer.crop(-layer.get_seq_length())
        self._forget()

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Put the rows in the order `beam_idx`."""
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change_rows(lambda rows: rows.index_select(0, beam_idx.to(rows.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row."""
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change_rows(lambda rows: rows.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep only these rows."""
        super().batch_select_indices(indices)  # type: ignore[misc]
        chosen = torch.as_tensor(indices)
        self._change_rows(lambda rows: rows[chosen.to(rows.device), ...])

    def __reduce_ex__(self, protocol: Any) -> Any:
        return _rebuild, (_host_class(self),), dict(self.__dict__)

    def __repr__(self) -> str:
        state = self.__dict__.get(_STATE)
        kind = _host_class(self).__name__
        if state is None:
            return f"{kind}(pruned by vlmprune, its state lost)"
        held = [entries(self, layer) for layer in range(len(self.layers))]  # type: ignore[attr-defined]
        return f"{kind}(pruned by {state.method!r}: {state.caller_past(self)} tokens, entries per layer {held})"

    def _change_rows(self, change: Any) -> None:
        state = self.__dict__.get(_STATE)
        if state is None:
            return
        self.__dict__[_STATE] = state.with_rows(change)
        for layer in self.layers:  # type: ignore[attr-defined]
            # The host leaves layers without entries as they are; here that is a row of which only padding is left.
            if isinstance(layer, DynamicLayer) and layer.is_initialized and not layer.get_seq_length():
                layer.keys, layer.values = change(layer.keys), change(layer.values)

    def _forget(self) -> None:
        for name in (_STATE, _RUNNING, _PREPARED, _TRUSTED, _MEASURED):
            self.__dict__.pop(name, None)
        self.__class__ = _host_class(self)

    def _known(self) -> PrunedCacheState:
        state: PrunedCacheState | None = self.__dict__.get(_STATE)
        if state is None:
            raise UnsupportedCallError(
                "This KV cache was gathered from pruned ones and no longer knows what was dropped; start with a fresh cache."
            )
        return state

    def _refuse(self) -> NoReturn:
        state = self._known()
        raise UnsupportedCallError(
            f"This KV cache was pruned by {state.method!r}: it holds fewer entries than the {state.caller_past(self)} "
            "tokens it stands for, and the model that was called with it does not know which. Apply a method to the model "
            "(vlmprune.apply) and call the whole model, or start with a fresh cache."
        )


def _has_entries(layer: Any) -> bool:
    """Whether a layer holds keys of its own; some read those of others."""
    return hasattr(layer, "get_seq_length")


@cache
def _pruned_class(host_class: type) -> type:
    return type(f"Pruned{host_class.__name__}", (PrunedCache, host_class), {"__module__": __name__})


def _host_class(cache: PrunedCache) -> type:
    return type(cache).__mro__[2]


def _rebuild(host_class: type) -> Any:
    made: Any = _pruned_class(host_class)
    return made.__new__(made)


def cache_state(cache: Any) -> PrunedCacheState | None:
    """Return the state of a pruned cache; None for a cache that was never pruned, or was reset since.

    Raises:
        UnsupportedCallError: the cache was pruned, and its state was lost.
    """
    return cache._known() if isinstance(cache, PrunedCache) else None


def set_cache_state(cache: Any, state: PrunedCacheState) -> None:
    """Let a cache know that it was pruned, and how. The object stays the same."""
    cache.__dict__[_STATE] = state
    if not isinstance(cache, PrunedCache):
        host_class: Any = type(cache)
        cache.__class__ = _pruned_class(host_class)


def prepare_cache(cache: Any) -> None:
    """Let the next forward use a pruned cache as it is: mask and positions are made for its entries."""
    cache._vlmprune_running = cache._vlmprune_prepared = True


def trust_positions(cache: Any) -> None:
    """Say that the positions of the next call are the host's own."""
    cache.__dict__[_TRUSTED] = True


def take_trust(cache: Any) -> bool:
    """Return whether the positions of this call are the host's own; asked once a call."""
    return bool(cache.__dict__.pop(_TRUSTED, False))


def let_be_measured(cache: Any) -> None:
    """Let a patched model make masks with a pruned cache before it calls the language model, where they are made anew."""
    if isinstance(cache, PrunedCache):
        cache.__dict__[_MEASURED] = True


def open_cache(cache: Any) -> None:
    """Let a patched forward use a pruned cache."""
    cache._vlmprune_running = True


def close_cache(cache: Any) -> None:
    """End what `open_cache` or `prepare_cache` began."""
    if isinstance(cache, PrunedCache):
        cache._vlmprune_running = cache._vlmprune_prepared = False
        cache.__dict__.pop(_MEASURED, None)
