"""The way of a call through the sites of one applied method."""

from __future__ import annotations

import threading
from dataclasses import replace
from typing import Any

from vlmprune.errors import UnsupportedCallError, UnsupportedMethodError
from vlmprune.methods.layer_method import LayerMethod
from vlmprune.methods.needs import FIRST_LAYER, INSTRUCTION, PIXELS
from vlmprune.methods.pipeline import Pipeline

from .attention.site import AttentionSite
from .cache.continuation import continued_inputs
from .cache.state import PrunedCacheState
from .call_options import OptionsInForce, RowPipelines
from .calls import CallStack, LanguageModelCall
from .coordinates import check_rotary
from .encoder.packed_site import PackedEncoderSite
from .encoder.site import EncoderSite
from .families.family import Family
from .hooks import HookSet, forget_compiled
from .layers.site import LayerSite
from .prefill.site import InputSite
from .prefill.visuals import PrefillVisuals
from .run_records import entry_record, finished_record
from .tower.pixel_choice import PixelChoice
from .tower.tower_tokens import tower_groups
from .tracing import never_compiled

# Not on the sites, which are copied along with their model.
_PREPARING = threading.Lock()


class Sites:
    """Where the methods of a pipeline act: in the vision tower, before the first decoder layer, and between layers.

    Attributes:
        encoder: reduces in the blocks of the vision tower, or None.
        input: selects at the entry of the language model; there always, with a method that passes everything if need be.
        layer: drops between layers, or None.
        pixels: has the vision tower run on what the input method chose by its pixels, or None.
        attention: changes what layers attend to, or None.
        positions: "compact" or "original", for what is dropped at the entry.
    """

    def __init__(
        self, family: Family, pipeline: Pipeline, calls: CallStack, options: OptionsInForce, positions: str | None
    ) -> None:
        self.family = family
        self.pipeline = pipeline
        self.calls = calls
        keeping = [part for part in (pipeline.at_input, pipeline.at_layers) if part is not None and part.keep_positions]
        for part in keeping:
            check_rotary(family, part.name)
        # Tokens that carry position carry that of the full prompt.
        positions = positions or ("original" if keeping else None)
        self.positions = positions or ("original" if family.mrope else "compact")
        self._asked_positions = positions
        self.encoder: EncoderSite | PackedEncoderSite | None = None
        if pipeline.at_encoder is not None:
            site = PackedEncoderSite if family.tower_kind == "packed" else EncoderSite
            self.encoder = site(family, pipeline.at_encoder, calls, options)
        self.pixels = None
        if PIXELS in pipeline.at_input.needs:
            self.pixels = PixelChoice(family, pipeline.at_input, calls, options)
        later = () if pipeline.at_layers is None else pipeline.at_layers.vision_signals(family.tower_facts)
        if self.pixels is not None and later:
            assert pipeline.at_layers is not None
            raise UnsupportedMethodError(
                f"{pipeline.at_layers.name!r} reads all patches in the vision tower, and {pipeline.at_input.name!r} drops some "
                "before it; allowed: one of them."
            )
        self.input = InputSite(family, pipeline.at_input, calls, self.positions == "compact", later)
        self.layer = None if pipeline.at_layers is None else self._layer_site(pipeline.at_layers)
        changes = pipeline.at_attention
        self.attention = None if changes is None else AttentionSite(family, changes, calls)

    @property
    def signal(self) -> str | None:
        """What the methods score by, in words; the record of a prefill says what was read in it."""
        names = [self.input.signal, *(site.signal for site in (self.layer, self.attention) if site is not None)]
        return ", ".join(name for name in names if name) or None

    def prompt_reader(self) -> str | None:
        """Return the name of the method that scores with what follows the images in the prompt, or None."""
        for site in (self.layer, self.attention):
            if site is not None:
                return site.method.name
        reads = {INSTRUCTION, FIRST_LAYER} & self.input.method.needs
        return self.input.method.name if reads else None

    def install(self, hooks: HookSet) -> None:
        """Register the hooks on the vision tower and on the encoders' calls."""
        if self.encoder is not None:
            self.encoder.install(
                hooks, [signal.layer for signal in self.input.watched_signals if signal.kind == "states"]
            )
        if self.pixels is not None:
            self.pixels.install(hooks)
        self.input.install(hooks, None if self.encoder is None else self.encoder.check_inputs)
        if self.encoder is not None:
            self.encoder.install_behind(hooks)

    def begin_attention(self, call: LanguageModelCall, visuals: PrefillVisuals | None) -> None:
        """Begin what changes in the attention of a call; `visuals` are the images of a prefill."""
        if self.attention is not None:
            self.attention.begin(call, visuals)

    def prepare(self, pipelines: RowPipelines, hooks: HookSet) -> None:
        """Register the hooks that the applied methods need once they run with these budgets.

        Raises:
            BudgetError: a budget that the model's layers, or the blocks of its vision tower, cannot reach.
        """
        for pipeline in pipelines.pipelines:
            if self.encoder is not None and pipeline.at_encoder is not None:
                self.encoder.check(pipeline.at_encoder)
        with _PREPARING:
            before = len(hooks)
            for inner in (pipeline.at_layers for pipeline in pipelines.pipelines):
                if inner is not None:
                    site = self.layer or self._layer_site(inner)
                    site.watch(inner, hooks)
                    self.layer = site
            if len(hooks) != before:
                forget_compiled()

    @never_compiled
    def prefill(self, call: LanguageModelCall, visuals: PrefillVisuals, pipelines: RowPipelines) -> dict[str, Any]:
        """Return the language model's arguments of a prefill with images; `call.record` says what enters it."""
        encoder = pipelines.pipelines[0].at_encoder
        if self.encoder is not None and encoder is not None and not visuals.encoded:
            self.encoder.check_given(encoder)
        cut = self.input.begin_prefill(call, visuals, pipelines)
        read = [None if cut.selection is None else self.input.signal, self.attention and self.attention.signal]
        signal = ", ".join(name for name in read if name) or None
        groups = [] if self.encoder is None else tower_groups(self.family, visuals)
        call.record = entry_record(self.pipeline.name, signal, self.family.decoder_layers, call, visuals, cut, groups)
        arguments = call.arguments
        if cut.compaction is not None:
            arguments = self.input.compacted(call, visuals, cut)
        if self.layer is not None:
            arguments = self.layer.begin_prefill(call, visuals, cut, arguments, pipelines)
        if cut.compaction is None and call.state is not None:
            call.arguments = arguments
            return self.continued(call, call.state)
        return arguments

    def continued(self, call: LanguageModelCall, state: PrunedCacheState) -> dict[str, Any]:
        """Return the language model's arguments of a call whose cache was pruned before."""
        arguments = continued_inputs(call)
        if call.model_call.has_visuals:
            call.left_behind = replace(state, tail_advances=False)
        if self.layer is not None and len(state.layer_groups) > 1 and call.layer_run is None:
            call.continued_layers = self.layer.continued_layers(call, state)
        return arguments

    @never_compiled
    def finish(self, call: LanguageModelCall, cache: Any) -> PrunedCacheState | None:
        """Complete `call.record`, and return what later calls with the same cache must know, or None.

        Args:
            call: the call that ends.
            cache: what it gives back, which the host may have made itself; None where there is none.
        """
        state = self._finish_dropping(call, cache)
        return state if self.attention is None else self.attention.finish(call, state)

    def _finish_dropping(self, call: LanguageModelCall, cache: Any) -> PrunedCacheState | None:
        run = call.layer_run
        if self.layer is None or run is None or run.images is None:
            return call.left_behind
        call.record = finished_record(run, self.layer.probe.signal(run.scored))
        return self.layer.left_behind(run, cache)

    def check_continues(self, state: PrunedCacheState) -> None:
        """Raise UnsupportedCallError unless layers that hold other tokens than the first, or attend otherwise, are watched."""
        changed = () if self.attention is None else self.attention.layers
        if (() if state.marks is None else state.marks.layers) != changed:
            raise UnsupportedCallError(
                f"The cache was made by {state.method!r}, and {self.pipeline.name!r} as it is applied now attends otherwise; "
                "continue it with the method and the parameters that made it."
            )
        if len(state.layer_groups) == 1:
            return
        first = state.layer_groups[1].first_layer
        if self.layer is None or self.layer.first_hooked > first:
            raise UnsupportedCallError(
                f"The cache was pruned from layer {first} on, where {self.pipeline.name!r} as it is applied now changes "
                "nothing; continue it with the method and the parameters that made it."
            )

    def _layer_site(self, method: LayerMethod) -> LayerSite:
        compact = (self._asked_positions or method.positions or self.positions) == "compact"
        return LayerSite(self.family, method, self.calls, compact, self.positions == "compact")
