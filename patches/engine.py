"""The running of a method inside a model's forward passes: one engine for every family and method."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import NoRunError, UnsupportedCallError
from vlmprune.layout import VisualLayout
from vlmprune.methods.base import Method
from vlmprune.methods.batch import Selection, VisualBatch
from vlmprune.methods.pipeline import Pipeline, check_serves_videos
from vlmprune.patches.cache.generation import patch_generation_inputs
from vlmprune.patches.cache.state import CacheSegment, PrunedCacheState, cache_state, set_cache_state
from vlmprune.patches.layers.run import LayerRun
from vlmprune.patches.layers.site import LayerSite
from vlmprune.patches.prefill.compaction import Compaction, gather_columns, plan_compaction, restore_columns
from vlmprune.patches.prefill.deepstack import compact_deepstack, merging_of
from vlmprune.patches.prefill.image_spans import ImageSpans, columns_of, find_image_spans, merge_spans
from vlmprune.patches.prefill.position_gaps import dropped_positions
from vlmprune.patches.tower.encoded_visuals import EncodedVisuals, encoded_visuals
from vlmprune.patches.tower.encoder_calls import watch_encoders
from vlmprune.record import RunRecord

from .calls import CallStack, ModelCall
from .families.family import Family
from .hooks import HookSet


class PruningEngine:
    """A method applied to one model.

    At the entry of the language model it selects visual tokens and compacts embeddings, mask and positions; at the exit it
    spreads the hidden states over the caller's columns. In later calls it translates mask and positions for the short cache.
    """

    def __init__(self, family: Family, pipeline: Pipeline, positions: str | None = None) -> None:
        self.family = family
        self.pipeline = pipeline
        first, inner = pipeline.at_input or pipeline.at_layers, pipeline.at_layers
        assert first is not None
        self.method: Method = first
        default = "original" if family.mrope else "compact"
        self.positions = positions or default
        self.frames = CallStack()
        self.layer_site: LayerSite | None = None
        if inner is not None:
            compact = (positions or inner.positions or default) == "compact"
            self.layer_site = LayerSite(family, inner, self.frames, compact)
        self.hooks = HookSet()
        self.record: RunRecord | None = None
        self._model_parameters = list(inspect.signature(family.multimodal_model.forward).parameters)

    def install(self) -> None:
        """Register all hooks; undone completely if one of them cannot be registered."""
        family, hooks = self.family, self.hooks
        try:
            signals = self.method.vision_signals(family.tower_facts)
            watch_encoders(family, signals, self.frames, hooks)
            hooks.before("model entry", family.multimodal_model, self._enter_model)
            hooks.after("model exit", family.multimodal_model, self._leave_model, always=True)
            hooks.before("language model entry", family.language_model, self._enter_language_model)
            hooks.after("language model exit", family.language_model, self._leave_language_model)
            if self.layer_site is not None:
                self.layer_site.install(hooks)
            patch_generation_inputs(family.model, hooks)
        except BaseException:
            hooks.remove()
            raise

    def last_run(self) -> RunRecord:
        """Return the record of the latest prefill."""
        if self.record is None:
            raise NoRunError(f"{self.pipeline.name!r} is applied, but no prefill has run yet. Call the model first.")
        return self.record

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self._model_parameters, args, strict=False)), **kwargs} if args else kwargs
        frame = ModelCall(inputs)
        self.frames.model.append(frame)
        given = inputs.get("mm_encoder_outputs") or {}
        frame.encoded = {name: given[name] for name in self.family.modalities if given.get(name) is not None}
        pixels = {"image": "pixel_values", "video": "pixel_values_videos"}
        present = [
            name for name in self.family.modalities if name in frame.encoded or inputs.get(pixels[name]) is not None
        ]
        if not present:
            return
        frame.modality_masks = {name: self._placeholders(inputs, name).cpu() for name in present}
        frame.visual_mask = torch.stack([*frame.modality_masks.values()]).any(0)
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            frame.attention_mask = mask.bool().cpu()

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.frames.model:
            self.frames.model.pop()

    def _placeholders(self, inputs: Mapping[str, Any], modality: str) -> Tensor:
        placeholder = self.family.placeholder_id(modality)
        if inputs.get("input_ids") is not None:
            return inputs["input_ids"] == placeholder
        embeddings = inputs["inputs_embeds"]
        token = torch.tensor(placeholder, device=embeddings.device)
        return (embeddings == self.family.multimodal_model.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]

    def _enter_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.frames.model:
            return None
        frame = self.frames.model[-1]
        if frame.encoded and frame.visual_mask is not None:
            return args, self._prefill(frame, kwargs)
        cache = kwargs.get("past_key_values")
        state = cache_state(cache) if cache is not None else None
        if state is None:
            if cache is None or int(cache.get_seq_length()) == 0:
                self._record_text_only(kwargs)
            return None
        return args, self._continue(frame, state, cache, kwargs)

    def _leave_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.frames.model:
            return None
        frame = self.frames.model[-1]
        compaction, state = frame.compaction or (None, None)
        run: LayerRun | None = frame.layer_run
        if run is not None and run.images is not None:
            assert self.layer_site is not None
            state = run.left_behind()
            self.record = self.layer_site.finish_record(run)
        if state is None:
            return None
        if output.past_key_values is not None:
            set_cache_state(output.past_key_values, state)

        def spread(hidden: Tensor | None, layer: int) -> Tensor | None:
            if hidden is None:
                return None
            if run is not None:
                return run.restored(hidden, layer)
            return hidden if compaction is None else restore_columns(hidden, compaction)

        output.last_hidden_state = spread(output.last_hidden_state, self.family.decoder_layers)
        if output.hidden_states is not None:
            earlier = [spread(hidden, layer - 1) for layer, hidden in enumerate(output.hidden_states[:-1])]
            output.hidden_states = (*earlier, output.last_hidden_state)
        return output

    def _prefill(self, frame: ModelCall, kwargs: dict[str, Any]) -> dict[str, Any]:
        encoded = self._encoded(frame)
        assert frame.visual_mask is not None
        embeddings = kwargs["inputs_embeds"]
        spans = merge_spans(
            [
                find_image_spans(
                    frame.modality_masks[visuals.modality],
                    self.family.token_counts(visuals.modality, frame.encoded[visuals.modality].pooler_output),
                    visuals.counts,
                    visuals.modality,
                )
                for visuals in encoded
            ]
        )
        budgets = tuple(self.method.budget(count) for count in spans.counts)
        if budgets == spans.counts:
            self._record(frame, spans, encoded, list(budgets), [0] * embeddings.shape[0])
            columns = spans.flat.to(embeddings.device, non_blocking=True)
            kwargs = self._begin_layers(frame, spans, columns, list(spans.counts), None, kwargs, kwargs)
            cache = kwargs.get("past_key_values")
            state = cache_state(cache) if cache is not None else None
            return kwargs if state is None else self._continue(frame, state, cache, kwargs)
        self._check_mask(kwargs.get("attention_mask"))

        selection, unique_counts = self._select(spans, encoded, budgets, embeddings)
        kept_columns, per_image = self._kept_columns(spans, selection, embeddings.device)
        kept_counts = [unique_counts[image] for image in spans.unique]
        compaction = self._plan(frame, spans, kept_counts, kept_columns, embeddings)
        self._record(frame, spans, encoded, per_image, list(compaction.removed))
        compacted = self._compacted_inputs(frame, compaction, spans, selection, kept_columns, kwargs)
        return self._begin_layers(frame, spans, kept_columns, per_image, compaction, kwargs, compacted)

    def _begin_layers(
        self,
        frame: ModelCall,
        spans: ImageSpans,
        columns: Tensor,
        index: Sequence[Tensor | int],
        entry: Compaction | None,
        given: dict[str, Any],
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        if self.layer_site is None:
            return kwargs
        cache = given.get("past_key_values")
        state = cache_state(cache) if cache is not None else None
        past = int(cache.get_seq_length()) if cache is not None else 0
        call = self._layer_run(frame, state, cache, given)
        frame.layer_run = run = self.layer_site.begin_prefill(frame, spans, columns, index, entry, past, call)
        if run is None:
            return kwargs
        self._check_mask(given.get("attention_mask"))
        return self.layer_site.hold_back_deepstack(run, kwargs)

    def _layer_run(
        self, frame: ModelCall, state: PrunedCacheState | None, cache: Any, kwargs: Mapping[str, Any]
    ) -> LayerRun:
        embeddings, mask = kwargs.get("inputs_embeds"), kwargs.get("attention_mask")
        tokens = embeddings if embeddings is not None else kwargs["input_ids"]
        past = 0 if cache is None else int(cache.get_seq_length()) if state is None else state.caller_past(cache)
        if isinstance(mask, Tensor):
            # What lies before `start` is in the cache's own state. The CPU copy spares a wait for the device.
            start, seen = 0 if state is None else state.caller_length, frame.attention_mask
            mask = None if bool((mask if seen is None else seen)[:, start:].all()) else mask.bool()
        return LayerRun(
            positions=self._positions(frame, kwargs, tokens, past, cache),
            mask=mask,
            caller_past=past,
            state=state,
            compact_entry=self.positions == "compact",
            compact_layers=self.layer_site is not None and self.layer_site.compact,
            record=frame.record,
        )

    def _encoded(self, frame: ModelCall) -> list[EncodedVisuals]:
        wanted = self.method.vision_signals(self.family.tower_facts)
        found = []
        for modality, output in frame.encoded.items():
            visuals = encoded_visuals(output)
            if visuals is None or any(signal not in visuals.vision for signal in wanted):
                raise UnsupportedCallError(
                    f"The {modality} features of this call were not encoded under the applied method: they were computed "
                    "before `apply`, or split by `prefill_chunk_size`. Pass the pixels, and leave `prefill_chunk_size` unset."
                )
            if modality == "video":
                check_serves_videos(self.pipeline)
            found.append(visuals)
        return found

    def _select(
        self, spans: ImageSpans, encoded: Sequence[EncodedVisuals], budgets: tuple[int, ...], embeddings: Tensor
    ) -> tuple[Selection, tuple[int, ...]]:
        family, device = self.family, embeddings.device
        shown = spans.first_of
        counts = tuple(spans.counts[image] for image in shown)
        columns = columns_of(shown, spans).to(device, non_blocking=True)
        vision, tile_vision = {}, {}
        for signal in self.method.vision_signals(family.tower_facts):
            read = [(visuals.vision[signal], visuals, visuals.layouts(family)) for visuals in encoded]
            vision[signal] = torch.cat([family.token_vision(*each).to(device) for each in read])
            if self.method.needs_tiles:
                tile_vision[signal] = tuple(maps.to(device) for each in read for maps in family.tile_vision(*each))
        batch = VisualBatch(
            features=embeddings.detach().flatten(0, 1)[columns],
            counts=counts,
            budgets=tuple(budgets[image] for image in shown),
            layouts=self._layouts(encoded),
            tower=family.tower_facts,
            vision=vision,
            tile_vision=tile_vision,
        )
        with torch.no_grad():
            selection = self.method.select(batch)
        return selection, selection.counts

    def _layouts(self, encoded: Sequence[EncodedVisuals]) -> tuple[VisualLayout, ...]:
        return tuple(layout for visuals in encoded for layout in visuals.layouts(self.family))

    def _kept_columns(
        self, spans: ImageSpans, selection: Selection, device: torch.device
    ) -> tuple[Tensor, list[Tensor]]:
        kept = selection.kept.split(list(selection.counts))
        per_image = [kept[image] for image in spans.unique]
        flat = spans.flat.to(device, non_blocking=True).split(list(spans.counts))
        return torch.cat([columns[chosen] for columns, chosen in zip(flat, per_image, strict=True)]), per_image

    def _plan(
        self, frame: ModelCall, spans: ImageSpans, kept_counts: list[int], kept_columns: Tensor, embeddings: Tensor
    ) -> Compaction:
        assert frame.visual_mask is not None
        batch, columns = embeddings.shape[:2]
        valid = torch.ones_like(frame.visual_mask)
        if frame.attention_mask is not None:
            valid = frame.attention_mask[:, -columns:]
        text = valid & ~frame.visual_mask
        lengths, removed = text.sum(1).tolist(), [0] * batch
        for row, count, kept in zip(spans.rows, spans.counts, kept_counts, strict=True):
            lengths[row] += kept
            removed[row] += count - kept
        keep = text.to(embeddings.device, non_blocking=True).flatten()
        keep[kept_columns] = True
        visual = frame.visual_mask.to(embeddings.device, non_blocking=True)
        return plan_compaction(keep.view(batch, columns), visual, tuple(lengths), tuple(removed))

    def _compacted_inputs(
        self,
        frame: ModelCall,
        compaction: Compaction,
        spans: ImageSpans,
        selection: Selection,
        kept_columns: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        embeddings, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        batch, columns = embeddings.shape[:2]
        past = int(cache.get_seq_length()) if cache is not None else 0
        state = cache_state(cache) if cache is not None else None
        if state is not None:
            state.check_batch(batch)
        caller_past = state.caller_past(cache) if state is not None else past

        present = compaction.index >= 0
        positions = self._positions(frame, kwargs, embeddings, caller_past, cache)
        removed = torch.zeros(batch, 1, dtype=torch.int64, device=embeddings.device)
        if state is not None:
            positions, removed = positions - state.removed, state.removed
        if self.positions == "compact":
            lower, dropped = self._dropped_positions(frame, compaction, positions)
            positions, removed = positions - lower, removed + dropped
        compacted, positions = gather_columns([embeddings, positions], compaction.index, dims=[0, positions.ndim - 2])
        if selection.features is not None:
            compacted = self._put_merged(compacted, compaction, spans, selection, kept_columns)

        valid = self._valid_columns(kwargs.get("attention_mask"), compaction, present, state, cache, past)
        frame.compaction = (
            compaction,
            PrunedCacheState(
                caller_past + columns,
                (
                    CacheSegment(
                        first_layer=0,
                        cache_length=past + compaction.width,
                        valid=valid,
                        removed=removed,
                    ),
                ),
            ),
        )
        mask = valid
        if mask is None and (cache is None or self.positions != "compact"):
            mask = torch.ones(batch, past + compaction.width, dtype=torch.bool, device=embeddings.device)
        caller_mask = kwargs.get("attention_mask")
        if mask is not None and caller_mask is not None:
            mask = mask.to(caller_mask.dtype)
        if positions.ndim == 3 and positions.shape[0] == 4:
            # The host makes masks from the first axis, where a gap would read as the border of a packed sequence.
            positions = torch.cat(
                [positions[:1, :, :1] + torch.arange(compaction.width, device=positions.device), positions[1:]]
            )
        kwargs = {**kwargs, "inputs_embeds": compacted, "position_ids": positions, "attention_mask": mask}
        return compact_deepstack(kwargs, compaction, kept_columns, merging_of(selection, spans))

    def _dropped_positions(self, frame: ModelCall, compaction: Compaction, positions: Tensor) -> tuple[Tensor, Tensor]:
        if not self.family.mrope:
            removed = torch.tensor(compaction.removed).to(positions.device, non_blocking=True)[:, None]
            return compaction.dropped_before, removed
        kept = compaction.destination < compaction.width
        present = torch.ones_like(kept)
        if frame.attention_mask is not None:
            present = frame.attention_mask[:, -kept.shape[1] :].to(kept.device, non_blocking=True)
        return dropped_positions(positions, present, kept)

    def _put_merged(
        self, compacted: Tensor, compaction: Compaction, spans: ImageSpans, selection: Selection, kept_columns: Tensor
    ) -> Tensor:
        assert selection.features is not None
        columns = compaction.destination.shape[1]
        target = compaction.destination.flatten()[kept_columns] + kept_columns // columns * compaction.width
        merged = selection.features.to(compacted.dtype).split(list(selection.counts))
        values = torch.cat([merged[image] for image in spans.unique])
        return compacted.flatten(0, 1).index_copy(0, target, values).view_as(compacted)

    def _valid_columns(
        self,
        attention_mask: Tensor | None,
        compaction: Compaction,
        present: Tensor,
        state: PrunedCacheState | None,
        cache: Any,
        past: int,
    ) -> Tensor | None:
        before: Tensor | None = None
        if past and state is not None:
            head_mask = None if attention_mask is None else attention_mask[:, : state.caller_past(cache)]
            before = state.valid_columns(cache, head_mask, 0)
        elif past and attention_mask is not None:
            before = attention_mask[:, :past].to(present)
        if before is None:
            if not compaction.ragged:
                return None
            before = torch.ones(present.shape[0], past, dtype=torch.bool, device=present.device)
        return torch.cat([before, present], dim=1)

    def _continue(
        self, frame: ModelCall, state: PrunedCacheState, cache: Any, kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        embeddings = kwargs.get("inputs_embeds")
        tokens = embeddings if embeddings is not None else kwargs["input_ids"]
        batch, columns = tokens.shape[:2]
        state.check_batch(batch)
        self._check_mask(kwargs.get("attention_mask"))
        mask = state.valid_columns(cache, kwargs.get("attention_mask"), columns)
        positions = self._positions(frame, kwargs, tokens, state.caller_past(cache), cache)
        if len(state.segments) > 1 and frame.layer_run is None:
            self._check_segments(state)
            frame.layer_run = self._layer_run(frame, state, cache, kwargs)
        return {**kwargs, "attention_mask": mask, "position_ids": positions - state.removed}

    def _check_segments(self, state: PrunedCacheState) -> None:
        first = state.segments[1].first_layer
        if self.layer_site is None or self.layer_site.first_hooked > first:
            raise UnsupportedCallError(
                f"The cache was pruned from layer {first} on by another method than {self.pipeline.name!r}; "
                "continue it with the method that made it."
            )

    @staticmethod
    def _positions(frame: ModelCall, kwargs: Mapping[str, Any], tokens: Tensor, past: int, cache: Any) -> Tensor:
        """Return positions `[..., batch, columns]` of this call's tokens, which follow `past` tokens of the caller's sequence."""
        given, (batch, columns) = kwargs.get("position_ids"), tokens.shape[:2]
        if given is None:
            given = torch.arange(past, past + columns, device=tokens.device)[None]
        elif frame.inputs.get("position_ids") is None:
            # Made by the multimodal model (M-RoPE): of the whole mask, or without a mask counted on from the cache's length.
            given = given[..., -columns:]
            if frame.inputs.get("attention_mask") is None and cache is not None:
                given = given + (past - int(cache.get_seq_length()))
        return given.expand(*given.shape[:-2], batch, columns) if given.ndim > 1 else given.expand(batch, columns)

    @staticmethod
    def _check_mask(mask: Any) -> None:
        if mask is not None and not (isinstance(mask, Tensor) and mask.ndim == 2):
            kind = f"{mask.ndim}-D tensor" if isinstance(mask, Tensor) else type(mask).__name__
            raise UnsupportedCallError(
                f"attention_mask is a {kind}; a pruned call needs a 2-D mask [batch, tokens] or none. "
                "Static and other compiled caches prepare a 4-D mask: use the default dynamic cache."
            )

    def _record(
        self,
        frame: ModelCall,
        spans: ImageSpans,
        encoded: Sequence[EncodedVisuals],
        kept: list[Any],
        removed: list[int],
    ) -> None:
        assert frame.visual_mask is not None
        columns = frame.visual_mask.shape[1]
        valid = torch.ones_like(frame.visual_mask)
        if frame.attention_mask is not None:
            valid = frame.attention_mask[:, -columns:]
        visual = frame.visual_mask.sum(1).tolist()
        layouts = self._layouts(encoded)
        modalities = [visuals.modality for visuals in encoded for _ in visuals.counts]
        frame.record = self.record = RunRecord(
            method=self.pipeline.name,
            signal=self._signal_name(),
            text_tokens=(valid & ~frame.visual_mask).sum(1).tolist(),
            visual_tokens_per_layer=[
                [total - dropped] * self.family.decoder_layers for total, dropped in zip(visual, removed, strict=True)
            ],
            image_rows=spans.rows,
            image_totals=spans.counts,
            image_layouts=[layouts[image] for image in spans.unique],
            image_modalities=[modalities[image] for image in spans.unique],
            kept_per_image=kept,
        )

    def _record_text_only(self, kwargs: Mapping[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds")
        batch, columns = (embeddings if embeddings is not None else kwargs["input_ids"]).shape[:2]
        mask = kwargs.get("attention_mask")
        is_plain = isinstance(mask, Tensor) and mask.ndim == 2
        self.record = RunRecord(
            method=self.pipeline.name,
            signal=self._signal_name(),
            text_tokens=mask[:, -columns:].sum(1).tolist() if is_plain else [columns] * batch,  # type: ignore[index]
            visual_tokens_per_layer=[[0] * self.family.decoder_layers for _ in range(batch)],
            image_rows=(),
            image_totals=(),
            image_layouts=(),
            image_modalities=(),
            kept_per_image=(),
        )

    def _signal_name(self) -> str | None:
        signals = self.method.vision_signals(self.family.tower_facts)
        names = [f"{signal.kind} layer {signal.layer}" for signal in signals]
        if self.layer_site is not None:
            names.append(self.layer_site.signal)
        return ", ".join(names) or None
