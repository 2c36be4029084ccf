"""What a method reads of layers before those it cuts: one value a token, kept in the caller's columns."""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import Tensor, nn

from vlmprune.methods.layer_batch import LayerSignal
from vlmprune.methods.layer_method import LayerMethod

from ..calls import CallStack
from ..families.family import Family
from ..hooks import HookSet
from .probe import LayerProbe
from .run import LayerRun

_MODULES = {"attention": "self_attn", "mlp": "mlp"}


class LayerObserver:
    """The hooks on attention and MLP of the layers that a method's `layer_signals` name."""

    def __init__(self, family: Family, method: LayerMethod, calls: CallStack, probe: LayerProbe) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.probe = probe
        self.watched: set[LayerSignal] = set()

    def layers(self, method: LayerMethod) -> set[int]:
        """Return the layers that `method` reads signals of."""
        return {signal.layer for signal in method.layer_signals(self.family.decoder_layers)}

    def watch(self, method: LayerMethod, hooks: HookSet) -> None:
        """Register the hooks that are not there yet."""
        model: Any = self.family.language_model
        for signal in method.layer_signals(self.family.decoder_layers):
            if signal in self.watched or signal.kind not in _MODULES:
                continue
            self.watched.add(signal)
            module = hooks.child(model.layers[signal.layer], _MODULES[signal.kind])
            hooks.after(f"decoder layer {signal.layer} {signal.kind}", module, partial(self._observe, signal))

    def leave_layer(self, run: LayerRun, layer: int, kwargs: dict[str, Any]) -> None:
        """Read what is wanted of `layer`, which has run; `kwargs` are the next one's."""
        signal = LayerSignal("last_token_attention", layer)
        if run.images is None or signal not in self.method.layer_signals(self.family.decoder_layers):
            return
        if run.images.cut_after(layer):
            run.observed[signal] = run.in_callers_columns(self.probe.last_token_attention(run, layer, kwargs))

    def _observe(self, signal: LayerSignal, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        call = self.calls.language_call
        run = None if call is None else call.layer_run
        if run is None or run.images is None or not run.images.cut_after(signal.layer):
            return
        inputs: Tensor = args[0] if args else kwargs["hidden_states"]
        outputs: Tensor = output[0] if isinstance(output, tuple) else output
        values = self.method.observe(signal, inputs.detach(), outputs.detach(), run.present())
        run.observed[signal] = run.in_callers_columns(values)
