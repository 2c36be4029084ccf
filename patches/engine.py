"""The running of a method inside a model's forward passes: one engine for every family and method."""

from __future__ import annotations

import inspect
from typing import Any

from torch import nn

from vlmprune.errors import NoRunError
from vlmprune.methods.pipeline import Pipeline
from vlmprune.record import RunRecord

from .cache.continuation import begin_language_call
from .cache.generation import patch_generation
from .cache.pruned_cache import close_cache, let_be_measured
from .call_options import OptionsInForce, RowPipelines
from .calls import CallStack, LanguageModelCall, ModelCall
from .continuous_batching import refuse_continuous_batching
from .families.family import Family
from .hooks import HookSet, forget_compiled
from .outputs import restored_outputs
from .prefill.given_mask import warn_of_embeddings
from .prefill.host_masks import read_host_masks
from .prefill.model_calls import check_no_replica, read_model_call
from .prefill.placed_features import check_placed
from .router_logits import watch_balancing_loss
from .run_records import text_record
from .sites import Sites
from .tracing import check_not_exported


class PruningEngine:
    """A method applied to one model: the order of the hooks, and which way a call goes.

    At the entry of the language model the input site selects visual tokens and compacts embeddings, mask and positions; the
    layer site drops more between layers; at the exit the hidden states are spread over the caller's columns. Later calls
    with the same cache get mask and positions translated for it.
    """

    def __init__(self, family: Family, pipeline: Pipeline, positions: str | None = None) -> None:
        family.check()
        self.family = family
        self.pipeline = pipeline
        self.calls = CallStack()
        self.options = OptionsInForce()
        self.sites = Sites(family, pipeline, self.calls, self.options, positions)
        self.hooks = HookSet()
        self.record: RunRecord | None = None
        self._applied = RowPipelines((pipeline,))
        self._model_parameters = list(inspect.signature(family.multimodal_model.forward).parameters)
        self._language_parameters = list(inspect.signature(family.language_model.forward).parameters)
        self._told_of_embeddings = False

    def install(self) -> None:
        """Register all hooks; undone completely if one of them cannot be registered."""
        family, hooks = self.family, self.hooks
        try:
            self.sites.install(hooks)
            hooks.before("model entry", family.multimodal_model, self._enter_model)
            hooks.after("model exit", family.multimodal_model, self._leave_model, always=True)
            hooks.before("language model entry", family.language_model, self._enter_language_model)
            hooks.after("language model exit", family.language_model, self._leave_language_model, always=True)
            if self.sites.layer is not None:
                self.sites.layer.install(hooks)
            if self.sites.attention is not None:
                self.sites.attention.install(hooks)
            patch_generation(family.model, hooks, self.sites.prompt_reader)
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

    def prepare(self, pipelines: RowPipelines) -> None:
        """Register the hooks that the applied methods need once they run with these budgets.

        Raises:
            BudgetError: a budget that the model's layers cannot reach.
        """
        self.sites.prepare(pipelines, self.hooks)

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if getattr(kwargs.get("past_key_values"), "is_prepared", False):
            return
        check_no_replica(module)
        check_not_exported()
        inputs = {**dict(zip(self._model_parameters, args, strict=False)), **kwargs} if args else kwargs
        self.calls.model.append(ModelCall(inputs))
        let_be_measured(inputs.get("past_key_values"))
        read_model_call(self.family, self.calls.model[-1], self._model_parameters)

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        cache = kwargs.get("past_key_values")
        if getattr(cache, "is_prepared", False):
            close_cache(cache)
        elif self.calls.model:
            model_call = self.calls.model.pop()
            # The two name each other: without this what they hold would wait for the garbage collector.
            call, model_call.language_call = model_call.language_call, None
            close_cache(model_call.inputs.get("past_key_values"))
            if call is not None and call.cache is not None:
                close_cache(call.cache)

    def _enter_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if getattr(kwargs.get("past_key_values"), "is_prepared", False):
            return None
        if not self.calls.model:
            args, kwargs = (), {**dict(zip(self._language_parameters, args, strict=False)), **kwargs}
            check_not_exported()
            self.calls.model.append(ModelCall(kwargs, direct=True))
        if args:
            args, kwargs = (), {**dict(zip(self._language_parameters, args, strict=False)), **kwargs}
        call = begin_language_call(self.calls.model[-1], kwargs)
        call.host_masks = read_host_masks(call, self.family.multimodal_model, self.family.language_model)
        if call.state is not None:
            self.sites.check_continues(call.state)
        visuals = self.sites.input.visuals(call, self.options.current.visual_mask)
        if visuals is not None:
            self.hooks.check_in_place()
            if self.family.is_general and visuals.encoded:
                check_placed(self.family, call, visuals)
            arguments = self.sites.prefill(call, visuals, self.options.current.pipelines or self._applied)
            arguments = self._masked(call, arguments)
            self.sites.begin_attention(call, visuals)
            self.record = call.record
            return args, arguments
        if call.state is not None:
            arguments = self._masked(call, self.sites.continued(call, call.state))
            self.sites.begin_attention(call, None)
            return args, arguments
        if call.past == 0:
            self._tell_of_embeddings(call)
            self.record = text_record(self.pipeline.name, self.family.decoder_layers, call)
        return None

    def _leave_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        call = self.calls.language_call
        if call is None:
            return None
        if call.model_call.direct:
            self._leave_model(module, args, kwargs, output)
        if output is None:
            return None
        state = self.sites.finish(call, getattr(output, "past_key_values", None))
        if state is None:
            return None
        self.record = call.record or self.record
        return restored_outputs(call, state, output, self.family.decoder_layers)

    def _masked(self, call: LanguageModelCall, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return the arguments with the masks that the host would have made for them, where it makes masks."""
        if call.host_masks is None:
            return arguments
        blocks = self.family.attention_blocks(call.model_call.inputs, call.columns, call.caller_past)
        return call.host_masks.arguments(call, arguments, blocks)

    def _tell_of_embeddings(self, call: LanguageModelCall) -> None:
        embeddings, mask = call.model_call.inputs.get("inputs_embeds"), self.options.current.visual_mask
        if embeddings is not None and mask is None and not self._told_of_embeddings:
            self._told_of_embeddings = True
            warn_of_embeddings(self.pipeline.name)
