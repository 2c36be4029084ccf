"""The running of a method inside a model's forward passes: one engine for every family and method."""

from __future__ import annotations

import inspect
import threading
import warnings
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from vlmprune.errors import NoRunError, UnsupportedCallError, VlmpruneWarning
from vlmprune.methods.layer_method import LayerMethod
from vlmprune.methods.needs import INSTRUCTION
from vlmprune.methods.pipeline import Pipeline
from vlmprune.record import RunRecord

from .cache.continuation import continued_inputs
from .cache.drafts import take_drafts
from .cache.generation import patch_generation
from .cache.pruned_cache import cache_state, close_cache, open_cache, set_cache_state, take_trust
from .call_options import OptionsInForce, RowPipelines
from .calls import PIXELS, CallStack, LanguageModelCall, ModelCall
from .continuous_batching import refuse_continuous_batching
from .families.family import Family
from .hooks import HookSet, forget_compiled
from .layers.site import LayerSite
from .prefill.compaction import restore_columns
from .prefill.given_mask import given_visuals
from .prefill.site import InputSite
from .prefill.visuals import PrefillVisuals, read_visuals
from .router_logits import restored_router_logits, watch_balancing_loss
from .run_records import entry_record, finished_record, text_record
from .tracing import break_graph, check_not_exported

# Not on the engine, which is copied along with its model.
_PREPARING = threading.Lock()


class PruningEngine:
    """A method applied to one model: the order of the hooks, and the way of a call through the sites.

    At the entry of the language model the input site selects visual tokens and compacts embeddings, mask and positions; the
    layer site drops more between layers; at the exit the hidden states are spread over the caller's columns. Later calls
    with the same cache get mask and positions translated for it.
    """

    def __init__(self, family: Family, pipeline: Pipeline, positions: str | None = None) -> None:
        family.check()
        self.family = family
        self.pipeline = pipeline
        self._applied = RowPipelines((pipeline,))
        self.positions = positions or ("original" if family.mrope else "compact")
        self.calls = CallStack()
        self.input_site = InputSite(family, pipeline.at_input, self.calls, compact=self.positions == "compact")
        self._asked_positions = positions
        self.layer_site = self._layer_site(pipeline.at_layers)
        self.options = OptionsInForce()
        self.hooks = HookSet()
        self.record: RunRecord | None = None
        self._model_parameters = list(inspect.signature(family.multimodal_model.forward).parameters)
        self._language_parameters = list(inspect.signature(family.language_model.forward).parameters)
        self._told_of_embeddings = False

    def install(self) -> None:
        """Register all hooks; undone completely if one of them cannot be registered."""
        family, hooks = self.family, self.hooks
        try:
            self.input_site.install(hooks)
            hooks.before("model entry", family.multimodal_model, self._enter_model)
            hooks.after("model exit", family.multimodal_model, self._leave_model, always=True)
            hooks.before("language model entry", family.language_model, self._enter_language_model)
            hooks.after("language model exit", family.language_model, self._leave_language_model, always=True)
            if self.layer_site is not None:
                self.layer_site.install(hooks)
            patch_generation(family.model, hooks, self._prompt_reader)
            forget_compiled()
            refuse_continuous_batching(family.model, hooks)
            watch_balancing_loss(family.model, hooks)
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
        """What the methods score by, in words; the record of a prefill says what was read in it."""
        names = [self.input_site.signal, self.layer_site.signal if self.layer_site is not None else None]
        return ", ".join(name for name in names if name) or None

    def _prompt_reader(self) -> str | None:
        """Return the name of the method that scores with what follows the images in the prompt, or None."""
        if self.layer_site is not None:
            return self.layer_site.method.name
        method = self.input_site.method
        return method.name if INSTRUCTION in method.needs else None

    def prepare(self, pipelines: RowPipelines) -> None:
        """Register the hooks that the applied methods need once they run with these budgets.

        Raises:
            BudgetError: a budget that the model's layers cannot reach.
        """
        with _PREPARING:
            before = len(self.hooks)
            for pipeline in pipelines.pipelines:
                inner = pipeline.at_layers
                if inner is None:
                    continue
                site = self.layer_site or self._layer_site(inner)
                assert site is not None
                site.watch(inner, self.hooks)
                self.layer_site = site
            if len(self.hooks) != before:
                forget_compiled()

    def _layer_site(self, method: LayerMethod | None) -> LayerSite | None:
        if method is None:
            return None
        compact = (self._asked_positions or method.positions or self.positions) == "compact"
        return LayerSite(self.family, method, self.calls, compact, self.positions == "compact")

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(kwargs.get("past_key_values"), "is_prepared", False):
            return
        if getattr(module, "_is_replica", False):
            raise UnsupportedCallError(
                "DataParallel copies the model to several devices, and the copies share one set of hooks. "
                "Use one device, or DistributedDataParallel."
            )
        check_not_exported()
        inputs = {**dict(zip(self._model_parameters, args, strict=False)), **kwargs} if args else kwargs
        call = ModelCall(inputs)
        self.calls.model.append(call)
        modalities = self.family.modalities
        given = inputs.get("mm_encoder_outputs") or {}
        if given and "mm_encoder_outputs" not in self._model_parameters:
            raise UnsupportedCallError(
                f"mm_encoder_outputs was given; {type(module).__name__} of transformers {transformers.__version__} takes none "
                "and would go on without the images. Pass the pixels."
            )
        call.encoded = {name: given[name] for name in modalities if given.get(name) is not None}
        present = [name for name in modalities if name in call.encoded or inputs.get(PIXELS[name]) is not None]
        if not present:
            return
        break_graph()
        call.modality_masks = {name: self._placeholders(inputs, name).cpu() for name in present}
        call.visual_mask = torch.stack([*call.modality_masks.values()]).any(0)
        call.read_mask(inputs.get("attention_mask"))

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_prepared", False):
            close_cache(cache)
        elif self.calls.model:
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
        if getattr(kwargs.get("past_key_values"), "is_prepared", False):
            return None
        if not self.calls.model:
            args, kwargs = (), {**dict(zip(self._language_parameters, args, strict=False)), **kwargs}
            check_not_exported()
            self.calls.model.append(ModelCall(kwargs, direct=True))
        model_call = self.calls.model[-1]
        cache = kwargs.get("past_key_values")
        state = None if cache is None else cache_state(cache)
        call = model_call.language_call = LanguageModelCall(model_call, kwargs, state)
        if call.state is not None:
            open_cache(call.cache)
            call.state.check_entries(call.cache)
            if not take_trust(call.cache):
                call.check_positions()
            LayerSite.check_continues(self.layer_site, call.state, self.pipeline)
        if call.cache is not None:
            call.drafts = take_drafts(call.cache, call.caller_past + call.columns)
        given = self._given_visuals(call)
        if given is not None:
            return args, self._prefill(call, given)
        if model_call.has_visuals:
            signals, live = self.input_site.signals, self.input_site.live
            return args, self._prefill(call, read_visuals(self.family, model_call, signals, live))
        if model_call.visual_mask is not None:
            raise UnsupportedCallError(
                f"Pixels were given, but {type(self.family.multimodal_model).__name__} did not encode them where "
                "vlmprune watches it: it was wrapped or changed since `apply`. Call vlmprune.remove(model) and apply again."
            )
        if call.state is not None:
            return args, self._continue(call)
        if call.past == 0:
            self._tell_of_embeddings(call)
            self.record = text_record(self.pipeline.name, self.family.decoder_layers, call)
        return None

    def _given_visuals(self, call: LanguageModelCall) -> PrefillVisuals | None:
        mask = self.options.current.visual_mask
        visuals = None if mask is None else given_visuals(call, mask)
        if visuals is not None:
            call.model_call.visual_mask = torch.zeros(call.batch * call.columns, dtype=torch.bool)
            call.model_call.visual_mask[visuals.spans.flat] = True
            call.model_call.visual_mask = call.model_call.visual_mask.view(call.batch, call.columns)
            call.model_call.read_mask(call.mask)
        return visuals

    def _tell_of_embeddings(self, call: LanguageModelCall) -> None:
        inputs = call.model_call.inputs
        if (
            self._told_of_embeddings
            or inputs.get("inputs_embeds") is None
            or self.options.current.visual_mask is not None
        ):
            return
        self._told_of_embeddings = True
        warnings.warn(
            f"{self.pipeline.name!r} is applied, and a call brought embeddings but no images: nothing was pruned. If visual "
            "tokens are among them, say where: `with vlmprune.options(model, visual_mask=...)`. This is said once.",
            VlmpruneWarning,
            stacklevel=2,
        )

    def _prefill(self, call: LanguageModelCall, visuals: PrefillVisuals) -> dict[str, Any]:
        self.hooks.check_in_place()
        pipelines = self.options.current.pipelines or self._applied
        cut = self.input_site.begin_prefill(call, visuals, pipelines)
        name, depth = self.pipeline.name, self.family.decoder_layers
        signal = None if cut.selection is None else self.input_site.signal
        call.record = self.record = entry_record(name, signal, depth, call, visuals, cut)
        arguments = call.arguments
        if cut.compaction is not None:
            arguments = self.input_site.compacted(call, visuals, cut)
        if self.layer_site is not None:
            arguments = self.layer_site.begin_prefill(call, visuals, cut, arguments, pipelines)
        if cut.compaction is None and call.state is not None:
            call.arguments = arguments
            return self._continue(call)
        return arguments

    def _continue(self, call: LanguageModelCall) -> dict[str, Any]:
        arguments = continued_inputs(call)
        assert call.state is not None
        if call.model_call.has_visuals:
            call.left_behind = replace(call.state, tail_advances=False)
        if len(call.state.layer_groups) > 1 and call.layer_run is None:
            assert self.layer_site is not None
            call.layer_run = self.layer_site.layer_run(call)
        return arguments

    def _leave_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self.calls.language_call
        if call is None:
            return None
        if call.model_call.direct:
            self._leave_model(module, args, kwargs, output)
        if output is None:
            return None
        entry, run, state = call.entry, call.layer_run, call.left_behind
        if run is not None and run.images is not None:
            state = run.left_behind()
            assert self.layer_site is not None
            self.record = finished_record(run, self.layer_site.probe.signal(run.scored))
        if state is None:
            return None
        if isinstance(output, tuple) and not hasattr(output, "last_hidden_state"):
            raise UnsupportedCallError("return_dict=False in a pruned call of the language model; leave it unset.")
        if output.past_key_values is not None:
            set_cache_state(output.past_key_values, state)

        def spread(hidden: Tensor, layer: int) -> Tensor:
            if run is not None:
                return run.restored(hidden, layer)
            return hidden if entry is None else restore_columns(hidden, entry)

        if output.last_hidden_state is not None:
            output.last_hidden_state = spread(output.last_hidden_state, self.family.decoder_layers)
        if output.hidden_states is not None:
            earlier = [spread(hidden, layer - 1) for layer, hidden in enumerate(output.hidden_states[:-1])]
            output.hidden_states = (*earlier, output.last_hidden_state)
        if isinstance(getattr(output, "router_logits", None), tuple):
            output.router_logits = restored_router_logits(output.router_logits, spread, call.valid)
        return output
