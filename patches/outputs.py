"""What a pruned call of the language model gives back: hidden states in the caller's columns."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from vlmprune.errors import UnsupportedCallError

from .cache.pruned_cache import set_cache_state
from .cache.state import PrunedCacheState
from .calls import LanguageModelCall
from .prefill.compaction import restore_columns
from .router_logits import restored_router_logits


def restored_outputs(call: LanguageModelCall, state: PrunedCacheState, output: Any, decoder_layers: int) -> Any:
    """Spread the output of a shorter sequence over the caller's columns, and tell its cache what it holds.

    Args:
        call: the call that ends.
        state: what later calls with the same cache must know.
        output: what the language model returned; changed in place.
        decoder_layers: number of its layers.

    Raises:
        UnsupportedCallError: the output is a plain tuple.
    """
    if isinstance(output, tuple) and not hasattr(output, "last_hidden_state"):
        raise UnsupportedCallError("return_dict=False in a pruned call of the language model; leave it unset.")
    if output.past_key_values is not None:
        set_cache_state(output.past_key_values, state)

    width = None if call.entry is None else call.entry.width

    def spread(hidden: Tensor, layer: int) -> Tensor:
        if call.layer_run is None and width is not None and hidden.shape[1] < width:
            # Some hosts go on with the last tokens alone (`logits_to_keep`) once no later layer needs the others' states.
            return hidden
        if call.layer_run is not None:
            return call.layer_run.restored(hidden, layer)
        return hidden if call.entry is None else restore_columns(hidden, call.entry)

    if output.last_hidden_state is not None:
        output.last_hidden_state = spread(output.last_hidden_state, decoder_layers)
    if output.hidden_states is not None:
        earlier = [spread(hidden, layer - 1) for layer, hidden in enumerate(output.hidden_states[:-1])]
        output.hidden_states = (*earlier, output.last_hidden_state)
    if isinstance(getattr(output, "router_logits", None), tuple):
        output.router_logits = restored_router_logits(output.router_logits, spread, call.valid)
    return output
