"""The running of a method inside a model's forward passes: one engine for every family and method."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import NoRunError, UnsupportedCallError
from vlmprune.methods.base import Method
from vlmprune.methods.visual_batch import Selection, VisualBatch
from vlmprune.record import RunRecord
from .call_frames import FrameStack, ModelFrame
from .compaction import Compaction, plan_compaction, restore_columns
from .families.family import Family
from .hooks import HookSet
from .image_spans import ImageSpans, columns_of, find_image_spans
from .multi_turn import patch_generation_inputs
from .pruned_cache import PrunedCacheState, cache_state, set_cache_state
from .vision_capture import SIGNALS_ATTRIBUTE, VisionCapture


class PruningEngine:
    """A method applied to one model.

    At the entry of the language model it selects visual tokens and compacts embeddings, mask and positions; at the exit it
    spreads the hidden states over the caller's columns. In later calls it translates mask and positions for the short cache.
    """

    def __init__(self, family: Family, method: Method, positions: str) -> None:
        self.family = family
        self.method = method
        self.positions = positions
        self.frames = FrameStack()
        self.hooks = HookSet()
        self.record: RunRecord | None = None
        self._model_parameters = list(inspect.signature(family.multimodal_model.forward).parameters)

    def install(self) -> None:
        """Register all hooks; undone completely if one of them cannot be registered."""
        family, hooks = self.family, self.hooks
        try:
            signals = self.method.vision_signals(family.tower_facts)
            VisionCapture(signals, self.frames).install(family, hooks)
            hooks.before("model entry", family.multimodal_model, self._enter_model)
            hooks.after("model exit", family.multimodal_model, self._leave_model, always=True)
            hooks.before("language model entry", family.language_model, self._enter_language_model)
            hooks.after("language model exit", family.language_model, self._leave_language_model)
            patch_generation_inputs(family.model, hooks)
        except BaseException:
            hooks.remove()
            raise

    def last_run(self) -> RunRecord:
        """Return the record of the latest prefill."""
        if self.record is None:
            raise NoRunError(f"{self.method.name!r} is applied, but no prefill has run yet. Call the model first.")
        return self.record

    def _enter_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        inputs = {**dict(zip(self._model_parameters, args, strict=False)), **kwargs} if args else kwargs
        frame = ModelFrame(inputs)
        self.frames.model.append(frame)
        encoded = inputs.get("mm_encoder_outputs") or {}
        if encoded.get("image") is not None:
            frame.image_outputs = encoded["image"]
        elif inputs.get("pixel_values") is None:
            return
        frame.visual_mask = self._placeholders(inputs).cpu()
        mask = inputs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            frame.attention_mask = mask.bool().cpu()

    def _leave_model(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        if self.frames.model:
            self.frames.model.pop()

    def _placeholders(self, inputs: Mapping[str, Any]) -> Tensor:
        if inputs.get("input_ids") is not None:
            return inputs["input_ids"] == self.family.image_token_id  # type: ignore[no-any-return]
        embeddings = inputs["inputs_embeds"]
        token = torch.tensor(self.family.image_token_id, device=embeddings.device)
        return (embeddings == self.family.multimodal_model.get_input_embeddings()(token)).all(-1)  # type: ignore[operator]

    def _enter_language_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if not self.frames.model:
            return None
        frame = self.frames.model[-1]
        if frame.image_outputs is not None and frame.visual_mask is not None:
            return args, self._prefill(frame, kwargs)
        cache = kwargs.get("past_key_values")
        state = cache_state(cache) if cache is not None else None
        if state is None:
            if cache is None or int(cache.get_seq_length()) == 0:
                self._record_text_only(kwargs)
            return None
        return args, self._continue(state, cache, kwargs)

    def _leave_language_model(self, module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
        if not self.frames.model or self.frames.model[-1].compaction is None:
            return None
        frame = self.frames.model[-1]
        compaction, state = frame.compaction
        if output.past_key_values is not None:
            set_cache_state(output.past_key_values, state)
        output.last_hidden_state = restore_columns(output.last_hidden_state, compaction)
        if output.hidden_states is not None:
            spread = [None if h is None else restore_columns(h, compaction) for h in output.hidden_states[:-1]]
            output.hidden_states = (*spread, output.last_hidden_state)
        return output

    def _prefill(self, frame: ModelFrame, kwargs: dict[str, Any]) -> dict[str, Any]:
        signals = getattr(frame.image_outputs, SIGNALS_ATTRIBUTE, None)
        if signals is None:
            raise UnsupportedCallError(
                "The image features of this call were not encoded under the applied method: they were computed before `apply`, "
                "or split by `prefill_chunk_size`. Pass `pixel_values`, and leave `prefill_chunk_size` unset."
            )
        assert frame.visual_mask is not None
        embeddings = kwargs["inputs_embeds"]
        spans = find_image_spans(frame.visual_mask, frame.image_outputs.pooler_output)
        budgets = tuple(self.method.budget(count) for count in spans.counts)
        if budgets == spans.counts:
            self._record(frame, spans, list(budgets), [0] * embeddings.shape[0])
            cache = kwargs.get("past_key_values")
            state = cache_state(cache) if cache is not None else None
            return kwargs if state is None else self._continue(state, cache, kwargs)
        self._check_mask(kwargs.get("attention_mask"))

        selection, unique_counts = self._select(frame, spans, budgets, embeddings, signals.vision)
        kept_columns, per_image = self._kept_columns(spans, selection, embeddings.device)
        kept_counts = [unique_counts[image] for image in spans.unique]
        compaction = self._plan(frame, spans, kept_counts, kept_columns, embeddings)
        self._record(frame, spans, per_image, list(compaction.removed))
        return self._compacted_inputs(frame, compaction, spans, selection, kept_columns, kwargs)

    def _select(
        self, frame: ModelFrame, spans: ImageSpans, budgets: tuple[int, ...], embeddings: Tensor, vision: Mapping[Any, Tensor]
    ) -> tuple[Selection, tuple[int, ...]]:
        shown = spans.first_of
        counts = tuple(spans.counts[image] for image in shown)
        columns = columns_of(shown, spans).to(embeddings.device, non_blocking=True)
        layouts = self.family.layouts(counts, frame.image_outputs, frame.inputs)
        batch = VisualBatch(
            features=embeddings.detach().flatten(0, 1)[columns],
            counts=counts,
            budgets=tuple(budgets[image] for image in shown),
            layouts=layouts,
            tower=self.family.tower_facts,
            vision={
                signal: self.family.image_vision(values, counts).to(embeddings.device) for signal, values in vision.items()
            },
        )
        with torch.no_grad():
            selection = self.method.select(batch)
        return selection, selection.counts

    def _kept_columns(
        self, spans: ImageSpans, selection: Selection, device: torch.device
    ) -> tuple[Tensor, list[Tensor]]:
        kept = selection.kept.split(list(selection.counts))
        per_image = [kept[image] for image in spans.unique]
        flat = spans.flat.to(device, non_blocking=True).split(list(spans.counts))
        return torch.cat([columns[chosen] for columns, chosen in zip(flat, per_image, strict=True)]), per_image

    def _plan(
        self, frame: ModelFrame, spans: ImageSpans, kept_counts: list[int], kept_columns: Tensor, embeddings: Tensor
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
        frame: ModelFrame,
        compaction: Compaction,
        spans: ImageSpans,
        selection: Selection,
        kept_columns: Tensor,
        kwargs: dict[str, Any],
    ) -> dict[str, Any]:
        embeddings, cache = kwargs["inputs_embeds"], kwargs.get("past_key_values")
        batch, columns, dim = embeddings.shape
        past = int(cache.get_seq_length()) if cache is not None else 0
        state = cache_state(cache) if cache is not None else None
        if state is not None:
            state.check_batch(batch)
        caller_past = state.caller_past(cache) if state is not None else past

        present = compaction.index >= 0
        gather = compaction.index.clamp(min=0)
        rows = torch.arange(batch, device=embeddings.device)[:, None]
        compacted = embeddings[rows, gather]
        if compaction.ragged:
            compacted = compacted * present[..., None]
        if selection.features is not None:
            compacted = self._put_merged(compacted, compaction, spans, selection, kept_columns)

        positions = self._positions(kwargs.get("position_ids"), batch, columns, caller_past, embeddings.device)
        if self.positions == "compact":
            positions = positions - compaction.dropped_before
            if state is not None:
                positions = positions - state.removed
        positions = positions.take_along_dim(gather.expand(*positions.shape[:-1], -1), -1) * present

        removed = torch.tensor(compaction.removed).to(embeddings.device, non_blocking=True)[:, None]
        if self.positions != "compact":
            removed = torch.zeros_like(removed)
        valid = self._valid_columns(kwargs.get("attention_mask"), compaction, present, state, cache, past)
        frame.compaction = (
            compaction,
            PrunedCacheState(
                caller_length=caller_past + columns,
                cache_length=past + compaction.width,
                valid=valid,
                removed=removed if state is None else removed + state.removed,
            ),
        )
        mask = valid
        if mask is None and (cache is None or self.positions != "compact"):
            mask = torch.ones(batch, past + compaction.width, dtype=torch.bool, device=embeddings.device)
        caller_mask = kwargs.get("attention_mask")
        if mask is not None and caller_mask is not None:
            mask = mask.to(caller_mask.dtype)
        return {**kwargs, "inputs_embeds": compacted, "position_ids": positions, "attention_mask": mask}

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

    def _continue(self, state: PrunedCacheState, cache: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        embeddings = kwargs.get("inputs_embeds")
        tokens = embeddings if embeddings is not None else kwargs["input_ids"]
        batch, columns = tokens.shape[:2]
        state.check_batch(batch)
        self._check_mask(kwargs.get("attention_mask"))
        mask = state.valid_columns(cache, kwargs.get("attention_mask"), columns)
        caller_past = state.caller_past(cache)
        positions = self._positions(kwargs.get("position_ids"), batch, columns, caller_past, tokens.device)
        return {**kwargs, "attention_mask": mask, "position_ids": positions - state.removed}

    @staticmethod
    def _positions(given: Tensor | None, batch: int, columns: int, past: int, device: torch.device) -> Tensor:
        if given is None:
            given = torch.arange(past, past + columns, device=device)[None]
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
        self, frame: ModelFrame, spans: ImageSpans, kept: list[Any], removed: list[int]
    ) -> None:
        assert frame.visual_mask is not None
        columns = frame.visual_mask.shape[1]
        valid = torch.ones_like(frame.visual_mask)
        if frame.attention_mask is not None:
            valid = frame.attention_mask[:, -columns:]
        visual = frame.visual_mask.sum(1).tolist()
        layouts = self.family.layouts(spans.counts, frame.image_outputs, frame.inputs)
        self.record = RunRecord(
            method=self.method.name,
            signal=self._signal_name(),
            text_tokens=(valid & ~frame.visual_mask).sum(1).tolist(),
            visual_tokens_per_layer=[
                [total - dropped] * self.family.decoder_layers for total, dropped in zip(visual, removed, strict=True)
            ],
            image_rows=spans.rows,
            image_totals=spans.counts,
            image_grids=[layout.grid for layout in layouts],
            kept_per_image=kept,
        )

    def _record_text_only(self, kwargs: Mapping[str, Any]) -> None:
        embeddings = kwargs.get("inputs_embeds")
        batch, columns = (embeddings if embeddings is not None else kwargs["input_ids"]).shape[:2]
        mask = kwargs.get("attention_mask")
        is_plain = isinstance(mask, Tensor) and mask.ndim == 2
        self.record = RunRecord(
            method=self.method.name,
            signal=self._signal_name(),
            text_tokens=mask[:, -columns:].sum(1).tolist() if is_plain else [columns] * batch,  # type: ignore[index]
            visual_tokens_per_layer=[[0] * self.family.decoder_layers for _ in range(batch)],
            image_rows=(),
            image_totals=(),
            image_grids=(),
            kept_per_image=(),
        )

    def _signal_name(self) -> str | None:
        signals = self.method.vision_signals(self.family.tower_facts)
        return ", ".join(f"{signal.kind} layer {signal.layer}" for signal in signals) or None
