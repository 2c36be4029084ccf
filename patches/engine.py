"""The running of a method inside a model's forward passes: one engine for every family and method."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import NoRunError, UnsupportedCallError
from vlmprune.methods.pipeline import Pipeline, check_call
from vlmprune.record import RunRecord

from .cache.continuation import continued_inputs
from .cache.generation import patch_generation
from .cache.pruned_cache import cache_state, close_cache, open_cache, set_cache_state
from .calls import CallStack, LanguageModelCall, ModelCall
from .families.family import Family
from .hooks import HookSet, forget_compiled
from .layers.site import LayerSite
from .prefill.compaction import restore_columns
from .prefill.site import InputSite
from .prefill.visuals import read_visuals
from .run_records import entry_record, text_record

_PIXELS = {"image": "pixel_values", "video": "pixel_values_videos"}


class PruningEngine:
    """A method applied to one model: the order of the hooks, and the way of a call through the sites.

    At the entry of the language model the input site selects visual tokens and compacts embeddings, mask and positions; the
    layer site drops more between layers; at the exit the hidden states are spread over the caller's columns. Later calls
    with the same cache get mask and positions translated for it.
    """

    def __init__(self, family: Family, pipeline: Pipeline, positions: str | None = None) -> None:
        self.family = family
        self.pipeline = pipeline
        inner = pipeline.at_layers
        self.positions = positions or ("original" if family.mrope else "compact")
        self.calls = CallStack()
        self.input_site = InputSite(family, pipeline.at_input, self.calls, compact=self.positions == "compact")
        self.layer_site: LayerSite | None = None
        if inner is not None:
            compact = (positions or inner.positions or self.positions) == "compact"
            self.layer_site = LayerSite(family, inner, self.calls, compact, self.positions == "compact")
        self.hooks = HookSet()
        self.record: RunRecord | None = None
        self._model_parameters = list(inspect.signature(family.multimodal_model.forward).parameters)

    def install(self) -> None:
        """Register all hooks; undone completely if one of them cannot be registered."""
        family, hooks = self.family, self.hooks
        try:
            self.input_site.install(hooks)
            hooks.before("model entry", family.multimodal_model, self._enter_model)
            hooks.after("model exit", family.multimodal_model, self._leave_model, always=True)
            hooks.before("language model entry", family.language_model, self._enter_language_model)
            hooks.after("language model exit", family.language_model, self._leave_language_model)
            if self.layer_site is not None:
                self.layer_site.install(hooks)
            patch_generation(family.model, hooks)
            forget_compiled()
        except BaseException:
            hooks.remove()
            raise

    def last_run(self) -> RunRecord:
        """Return the record of the latest prefill."""
        if self.record is None:
            raise NoRunError(f"{self.pipeline.name!r} is applied, but no prefill has run yet. Call the model first.")
        return self.record

    @property
    def signal(self) -> str | None:
        """What the methods score by, in words."""
        names = [self.input_site.signal, self.layer_site.signal if self.layer_site is not None else None]
        return ", ".join(name for name in names if name) or None

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(module, "_is_replica", False):
            raise UnsupportedCallError(
                "DataParallel copies the model to several devices, and the copies share one set of hooks. "
                "Use one device, or DistributedDataParallel."
            )
        inputs = {**dict(zip(self._model_parameters, args, strict=False)), **kwargs} if args else kwargs
        call = ModelCall(inputs)
        self.calls.model.append(call)
        modalities = self.family.modalities
        given = inputs.get("mm_encoder_outputs") or {}
        call.encoded = {name: given[name] for name in modalities if given.get(name) is not None}
        present = [name for name in modalities if name in call.encoded or inputs.get(_PIXELS[name]) is not None]
        if not present:
            return
        call.modality_masks = {name: self._placeholders(inputs, name).cpu() for name in present}
        call.visual_mask = torch.stack([*call.modality_masks.values()]).any(0)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            call.attention_mask = mask.bool().cpu()

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.calls.model:
            call = self.calls.model.pop().language_call
            if call is not None and call.cache is not None:
                close_cache(call.cache)

    def _placeholders(self, inputs: Mapping[str, Any], modality: str) -> Tensor:
        placeholder = self.family.placeholder_id(modality)
        if inputs.get("input_ids") is not None:
            return inputs["input_ids"] == placeholder
        embeddings = inputs["inputs_embeds"]
        token = torch.tensor(placeholder, device=embeddings.device)
        return (embeddings == self.family.multimodal_model.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]

    def _enter_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.calls.model:
            return None
        model_call = self.calls.model[-1]
        cache = kwargs.get("past_key_values")
        state = None if cache is None else cache_state(cache)
        call = model_call.language_call = LanguageModelCall(model_call, kwargs, state)
        if call.state is not None:
            open_cache(call.cache)
            call.state.check_entries(call.cache)
            LayerSite.check_continues(self.layer_site, call.state, self.pipeline.name)
        if model_call.has_visuals:
            return args, self._prefill(call)
        if model_call.visual_mask is not None:
            raise UnsupportedCallError(
                f"Pixels were given, but {type(self.family.multimodal_model).__name__} did not encode them where "
                "vlmprune watches it: it was wrapped or changed since `apply`. Call vlmprune.remove(model) and apply again."
            )
        if call.state is not None:
            return args, self._continue(call)
        if call.past == 0:
            self.record = text_record(self.pipeline.name, self.signal, self.family.decoder_layers, call)
        return None

    def _prefill(self, call: LanguageModelCall) -> dict[str, Any]:
        self.hooks.check_in_place()
        visuals = read_visuals(self.family, call.model_call, self.input_site.signals, self.input_site.live)
        check_call(self.pipeline, set(visuals.modalities))
        cut = self.input_site.begin_prefill(call, visuals)
        name, depth = self.pipeline.name, self.family.decoder_layers
        call.record = self.record = entry_record(name, self.signal, depth, call, visuals, cut)
        arguments = call.arguments
        if cut.compaction is not None:
            arguments = self.input_site.compacted(call, visuals, cut)
        if self.layer_site is not None:
            arguments = self.layer_site.begin_prefill(call, visuals, cut, arguments)
        if cut.compaction is None and call.state is not None:
            call.arguments = arguments
            return self._continue(call)
        return arguments

    def _continue(self, call: LanguageModelCall) -> dict[str, Any]:
        arguments = continued_inputs(call)
        assert call.state is not None
        if len(call.state.layer_groups) > 1 and call.layer_run is None:
            assert self.layer_site is not None
            call.layer_run = self.layer_site.layer_run(call)
        return arguments

    def _leave_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self.calls.language_call
        if call is None:
            return None
        entry, run, state = call.entry, call.layer_run, call.left_behind
        if run is not None and run.images is not None:
            state = run.left_behind()
            self.record = LayerSite.finish_record(run)
        if state is None:
            return None
        if output.past_key_values is not None:
            set_cache_state(output.past_key_values, state)

        def spread(hidden: Tensor | None, layer: int) -> Tensor | None:
            if hidden is None:
                return None
            if run is not None:
                return run.restored(hidden, layer)
            return hidden if entry is None else restore_columns(hidden, entry)

        output.last_hidden_state = spread(output.last_hidden_state, self.family.decoder_layers)
        if output.hidden_states is not None:
            earlier = [spread(hidden, layer - 1) for layer, hidden in enumerate(output.hidden_states[:-1])]
            output.hidden_states = (*earlier, output.last_hidden_state)
        return output
