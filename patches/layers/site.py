"""Dropping visual tokens between the layers of the language model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.batch import Selection, VisionSignal
from vlmprune.methods.layer_batch import LayerBatch, TextSpans
from vlmprune.methods.layer_method import LayerMethod
from vlmprune.methods.pipeline import check_call
from vlmprune.methods.shared.position_tokens import with_position_tokens
from vlmprune.methods.shared.rotary_coordinates import coordinate_ranks

from ..cache.state import PrunedCacheState
from ..cache.trim import check_can_trim, trim_cache
from ..call_options import RowPipelines
from ..calls import CallStack, LanguageModelCall
from ..coordinates import mean_coordinates
from ..families.decoder import check_decoder
from ..families.family import Family
from ..hooks import HookSet
from ..prefill.entry_cut import EntryCut
from ..prefill.packing import packed_prompts
from ..prefill.sequence_bounds import SEQUENCE_BOUNDS, padding_before
from ..prefill.token_arguments import token_arguments
from ..prefill.visuals import PrefillVisuals
from ..tracing import never_compiled
from .continued import ContinuedLayers, follows_length, rotary_positions
from .deepstack import add_deepstack, hold_back_deepstack
from .observer import LayerObserver
from .probe import LayerProbe
from .run import LayerRun
from .text_spans import find_text_spans
from .visual_tokens import VisualTokens


class LayerSite:
    """The hooks on the decoder layers, from the first that a method probes or cuts.

    At a cut the hidden states are compacted, and mask and positions are replaced for that layer and all later ones; the host
    passes every layer the ones it made for the first. In later calls each group of layers gets those of its own cache.
    """

    def __init__(
        self, family: Family, method: LayerMethod, calls: CallStack, compact: bool, compact_entry: bool
    ) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.compact = compact
        self.compact_entry = compact_entry
        self.first_hooked = family.decoder_layers
        self.together = False
        self.probe = LayerProbe(family, method, calls)
        self.observer = LayerObserver(family, method, calls, self.probe)

    @property
    def signal(self) -> str:
        """What the method scores by where its whole schedule is needed."""
        return self.probe.signal()

    def install(self, hooks: HookSet) -> None:
        """Register the hooks on layers and projections."""
        self.watch(self.method, hooks)

    def watch(self, method: LayerMethod, hooks: HookSet) -> None:
        """Register the hooks that `method` needs and that are not there yet; it differs from the site's own in `keep` alone.

        Raises:
            UnsupportedMethodError: the layers lack what dropping inside them needs.
        """
        model: Any = self.family.language_model
        probed = {self.probe.layer_of(cut) for cut in method.cut_layers(self.family.decoder_layers)}
        trimmed = method.trims_cache(self.family.decoder_layers)
        first = min(probed | self.observer.layers(method) | ({trimmed} if trimmed else set()))
        check_decoder(model, range(first, self.family.decoder_layers), method.name)
        if self.first_hooked == self.family.decoder_layers:
            self.together = not follows_length(model.rotary_emb)
            hooks.before("rotary embedding entry", model.rotary_emb, self._enter_rotary)
            hooks.after("rotary embedding exit", model.rotary_emb, self._leave_rotary)
        for layer in range(first, self.first_hooked):
            hooks.before(f"decoder layer {layer}", model.layers[layer], partial(self._enter_layer, layer))
        self.first_hooked = min(first, self.first_hooked)
        self.probe.watch(method, hooks)
        self.observer.watch(method, hooks)

    def begin_prefill(
        self,
        call: LanguageModelCall,
        visuals: PrefillVisuals,
        cut: EntryCut,
        arguments: dict[str, Any],
        pipelines: RowPipelines,
    ) -> dict[str, Any]:
        """Begin the run of a prefill with images, if something changes inside the language model.

        Args:
            call: the call in the caller's columns; its `layer_run` is set.
            visuals: the images.
            cut: what enters the language model.
            arguments: the language model's arguments after `cut`.
            pipelines: the methods as they run in each row.

        Returns:
            The arguments, without what the site adds itself after the first cut.

        Raises:
            UnsupportedCallError: something is to be dropped, and the call's mask is not two-dimensional.
            UnsupportedMethodError: something is to be dropped, and the method cannot serve a video that the call holds.
        """
        counts = [kept if isinstance(kept, int) else len(kept) for kept in cut.index]
        schedule = [
            self._schedule(count, pipelines.row(row, call.batch).at_layers)
            for row, count in zip(visuals.spans.rows, counts, strict=True)
        ]
        inner = call.state is not None and len(call.state.layer_groups) > 1
        if not any(schedule) and not inner:
            return arguments
        call.check_mask()
        if any(schedule):
            check_call(self.method, set(visuals.modalities), self.family)
        if any(schedule) and packed_prompts(call, text_axis=self.family.text_positions) is not None:
            raise UnsupportedCallError(
                f"Several prompts are packed in one row, and {self.method.name!r} scores with the last token of a row; "
                "allowed: one prompt a row, or a method that selects before the language model."
            )
        if any(schedule) and self.method.reads_whole_row and call.caller_past:
            raise UnsupportedCallError(
                f"An image behind {call.caller_past} tokens of earlier turns: {self.method.name!r} scores by what all tokens of "
                "the row do, and the cache holds only keys and values of those. Allowed: the whole conversation in one call, or "
                "another method."
            )
        if any(schedule) and self.method.trims_cache(self.family.decoder_layers) is not None:
            check_can_trim(call.cache, self.method.name)
        if any(schedule):
            self._check_arguments(call)
        spans = self._text_spans(call, visuals)
        self._check_text(spans, visuals.spans.rows, schedule)
        run = self.layer_run(call)
        device = cut.columns.device
        prompt = call.columns - call.drafts
        last = (call.valid[:, :prompt] * torch.arange(prompt)).amax(1)
        images = VisualTokens(
            rows=visuals.spans.rows,
            columns=list(cut.columns.split(counts)),
            index=[torch.arange(kept, device=device) if isinstance(kept, int) else kept for kept in cut.index],
            schedule=schedule,
            text=call.text.to(device, non_blocking=True),
            visual=call.visual.to(device, non_blocking=True),
            text_lengths=call.text.sum(1).tolist(),
            visual_lengths=call.visual.sum(1).tolist(),
            totals=visuals.spans.counts,
            layouts=[visuals.layouts[image] for image in visuals.spans.unique],
            spans=[TextSpans(*(part.to(device, non_blocking=True) for part in around)) for around in spans],
            vision=self._vision(visuals, device),
            carried=cut.carried(visuals.spans),
        )
        run = replace(
            run,
            images=images,
            entry=cut.compaction,
            last_column=last.to(device, non_blocking=True),
            embeddings=arguments.get("inputs_embeds"),
            padding_before=padding_before(call),
        )
        run.group_inputs(0, call.past)
        call.layer_run = run
        return hold_back_deepstack(run, arguments)

    def _check_arguments(self, call: LanguageModelCall) -> None:
        """Raise UnsupportedCallError for what the host would go on using by its own columns after a cut."""
        names = token_arguments(call.arguments)
        if names or call.host_masks is not None:
            named = names[0] if names else "an attention_mask of the host's own"
            raise UnsupportedCallError(
                f"{type(self.family.language_model).__name__} is given {named} in this call, which cannot be placed behind a cut "
                f"between layers; allowed: methods that act before the first layer, not {self.method.name!r}."
            )

    def continued_layers(self, call: LanguageModelCall, state: PrunedCacheState) -> ContinuedLayers:
        """Return what the layers are given in a call without images whose cache holds other tokens in later layers."""
        return ContinuedLayers(call, state, self.family, self.compact, self.together)

    def left_behind(self, run: LayerRun, cache: Any) -> PrunedCacheState:
        """Return what later calls must know after a prefill with images; `cache` is trimmed if the method says so."""
        state, first = run.left_behind(), self.method.trims_cache(self.family.decoder_layers)
        if first is None or cache is None or not run.cuts:
            return state
        return trim_cache(cache, state, first, self.method.counts_by_cache)

    def _text_spans(self, call: LanguageModelCall, visuals: PrefillVisuals) -> list[TextSpans]:
        prompt = torch.arange(call.columns) < call.columns - call.drafts
        columns = visuals.spans.flat.split(list(visuals.spans.counts))
        return find_text_spans(call.text & prompt, visuals.spans.rows, columns)

    def _check_text(
        self, spans: Sequence[TextSpans], rows: Sequence[int], schedule: Sequence[dict[int, int | None]]
    ) -> None:
        for row, around, cuts in zip(rows, spans, schedule, strict=True):
            if not len(around.after) and any(self.probe.need(cut).rows == "text" for cut in cuts):
                raise UnsupportedCallError(
                    f"Row {row} ends with an image, and {self.method.name!r} scores by the text behind it; allowed: a question "
                    "behind the images, or a method that does not score by text."
                )

    def _vision(self, visuals: PrefillVisuals, device: torch.device) -> dict[VisionSignal, list[Tensor]]:
        """Return what the method reads of the vision tower, per image as it is shown."""
        vision = {}
        for signal in self.method.vision_signals(self.family.tower_facts):
            tokens = torch.cat([shown.token_vision(self.family, signal).to(device) for shown in visuals.encoded])
            parts = tokens.split([visuals.spans.counts[image] for image in visuals.spans.first_of])
            vision[signal] = [parts[image] for image in visuals.spans.unique]
        return vision

    def layer_run(self, call: LanguageModelCall) -> LayerRun:
        """Return the run of a call as its arguments describe it, nothing dropped yet."""
        mask = call.mask
        if isinstance(mask, Tensor):
            # What lies before `start` is in the cache's own state. The CPU copy spares a wait for the device.
            start, seen = 0 if call.state is None else call.state.caller_length, call.model_call.attention_mask
            mask = None if bool((mask if seen is None else seen)[:, start:].all()) else mask.bool()
        return LayerRun(
            positions=call.positions,
            mask=mask,
            caller_past=call.caller_past,
            state=call.state,
            method=self.method.name,
            drafts=call.drafts,
            compact_entry=self.compact_entry,
            compact_layers=self.compact,
            record=call.record,
        )

    def _schedule(self, count: int, method: LayerMethod | None) -> dict[int, int | None]:
        """Return the layers at which an image of `count` tokens is cut, and to how many (None: the method decides)."""
        alive, wanted = count, {}
        for cut in method.schedule(count, self.family.decoder_layers) if method is not None else ():
            if cut.tokens is None or cut.tokens < alive:
                wanted[cut.layer] = cut.tokens
                alive = cut.tokens or 0
        return wanted

    def _enter_rotary(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        continued = self.calls.continued_layers
        if continued is None:
            return None
        given = "position_ids" in kwargs
        positions = continued.enter_rotary(kwargs["position_ids"] if given else args[1])
        if positions is None:
            return None
        return (args, {**kwargs, "position_ids": positions}) if given else ((args[0], positions, *args[2:]), kwargs)

    def _leave_rotary(self, module: nn.Module, args: Any, kwargs: Any, output: tuple[Tensor, ...]) -> Any:
        continued = self.calls.continued_layers
        return None if continued is None else continued.leave_rotary(output)

    def _enter_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        continued = self.calls.continued_layers
        if continued is not None:
            inputs = continued.enter(layer, args, kwargs)
            return None if inputs is None else (args, inputs)
        call = self.calls.language_call
        run = None if call is None else call.layer_run
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        entering = hidden
        if run.inputs is not None:
            kwargs = {**kwargs, **run.inputs}
        hidden = add_deepstack(run, hidden, layer - 1)
        self.observer.leave_layer(run, layer - 1, kwargs)
        if layer in run.boundaries:
            hidden, kwargs = self._change(run, layer, hidden, kwargs)
        self.probe.enter_layer(run, layer, kwargs)
        if run.inputs is None and hidden is entering:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _change(
        self, run: LayerRun, layer: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        cut, chosen = False, [] if run.images is None else run.images.images_at(layer)
        if chosen:
            hidden, cut = self._cut(run, layer, chosen, hidden, kwargs)
        inner = run.state is not None and run.state.group(layer).first_layer == layer
        if not cut and not inner:
            return hidden, kwargs
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length(layer))
        positions, valid = run.group_inputs(layer, past)
        model: Any = self.family.language_model
        run.inputs = {
            "attention_mask": create_causal_mask(
                config=model.config,
                inputs_embeds=hidden,
                attention_mask=valid,
                past_key_values=cache,
                layer_idx=layer,
                allow_is_causal_skip=valid is None,
            ),
            # Flash attention reads gaps as packed sequences, so only gapless positions go to the attention function.
            "position_ids": positions if positions.ndim == 2 and self._gapless(run) else None,
            "position_embeddings": model.rotary_emb(hidden, rotary_positions(self.family, positions)),
            # Those of the entry are too long now.
            **{name: None for name in SEQUENCE_BOUNDS if name in kwargs},
        }
        return hidden, {**kwargs, **run.inputs}

    def _with_positions(self, run: LayerRun, batch: LayerBatch) -> Selection:
        positions = run.current_positions(batch.layer)
        ranks = [
            coordinate_ranks(*mean_coordinates(self.family, positions[..., row, columns]).unbind(-1))
            for row, columns in zip(batch.rows, batch.columns, strict=True)
        ]
        return with_position_tokens(self.method.select_at_layer, batch, batch.budgets, ranks)

    def _gapless(self, run: LayerRun) -> bool:
        return run.compact_layers and (run.entry is None or run.compact_entry)

    @never_compiled
    def _cut(
        self, run: LayerRun, layer: int, chosen: list[int], hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, bool]:
        with torch.no_grad():
            batch, keys = self.probe.read(run, layer, chosen, hidden, kwargs)
            selection = (
                self._with_positions(run, batch) if self.method.keep_positions else self.method.select_at_layer(batch)
            )
        if selection.counts == batch.counts and selection.features is None:
            return hidden, False
        if self.method.masks:
            run.mask_out(layer, chosen, selection)
            return hidden, True
        return run.cut(layer, chosen, selection, hidden, keys), True
