"""Changing what decoder layers attend to, with their attention backend left as it is."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError, UnsupportedMethodError
from vlmprune.kernels.redistributed_attention import SINK
from vlmprune.methods.attention_method import AttentionMethod
from vlmprune.methods.pipeline import check_call

from ..cache.marks import AttentionMarks
from ..cache.state import LayerGroup, PrunedCacheState
from ..cache.trace import columns_held, highest_positions, positions_lowered
from ..calls import CallStack, LanguageModelCall
from ..families.decoder import check_decoder
from ..families.family import Family
from ..hooks import HookSet
from ..layers.run import LayerRun
from ..parts import Part, missing_parts
from ..prefill.packing import packed_prompts
from ..prefill.visuals import PrefillVisuals
from ..rotation import rotate
from .run import AttentionRun

_PARTS = tuple(Part(f"self_attn.{name}") for name in ("v_proj", "o_proj"))


class AttentionSite:
    """The hooks on the decoder layers whose attention a method changes.

    What enters a layer tells its sinks, once a prefill. Queries are kept as the layer projects them; keys and values are read
    from its cache, or kept too where there is none. What the rows' outputs gain is added before the output projection.
    """

    def __init__(self, family: Family, method: AttentionMethod, calls: CallStack) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.layers = method.changed_layers(family.decoder_layers)

    @property
    def signal(self) -> str:
        """What the method scores by, in words."""
        return f"spikes of hidden states layers {self.layers[0]} to {self.layers[-1]}"

    def install(self, hooks: HookSet) -> None:
        """Register the hooks.

        Raises:
            UnsupportedMethodError: the layers lack something that the method relies on.
            ParameterError: the hidden states are too narrow for it.
        """
        model: Any = self.family.language_model
        self.method.check_width(int(self.family.config.get_text_config().hidden_size))
        check_decoder(model, self.layers, self.method.name)
        for number in self.layers:
            layer = model.layers[number]
            missing = missing_parts(layer, _PARTS)
            if missing:
                raise UnsupportedMethodError(f"{self.method.name!r} changes attention: {'; '.join(missing)}.")
            attention = layer.self_attn
            norm = hooks.child(layer, "input_layernorm")
            hooks.before(f"decoder layer {number} sinks", norm, partial(self._find_sinks, number))
            hooks.before(f"decoder layer {number} attention", attention, partial(self._enter_attention, number))
            for kind in ("q_proj", "k_proj", "v_proj"):
                projection = hooks.child(attention, kind)
                hooks.after(f"decoder layer {number} {kind} attention", projection, partial(self._keep, number, kind))
            output = hooks.child(attention, "o_proj")
            hooks.before(f"decoder layer {number} change", output, partial(self._change, number))

    def begin(self, call: LanguageModelCall, visuals: PrefillVisuals | None) -> None:
        """Begin the run of a call after what drops tokens has begun; `visuals` are its images, or None.

        Raises:
            UnsupportedMethodError: the call holds a video.
            UnsupportedCallError: several prompts in a row, or a cache whose images were encoded without the method.
        """
        marks = None if call.state is None else call.state.marks
        if visuals is None and marks is None:
            return
        if visuals is not None:
            check_call(self.method, set(visuals.modalities), self.family)
            call.check_mask()
            if packed_prompts(call, text_axis=self.family.text_positions) is not None:
                raise UnsupportedCallError(
                    f"Several prompts are packed in one row, and {self.method.name!r} knows sinks by rows; allowed: one prompt "
                    "a row."
                )
        visual = call.visual.new_zeros(call.batch, call.caller_past)
        sinks: dict[int, Tensor] = {}
        if marks is not None:
            visual = marks.visual.cpu() if visuals is not None else marks.visual
            sinks = dict(zip(marks.layers, marks.sinks.unbind(1), strict=True))
        if visuals is not None:
            between = call.visual.new_zeros(call.batch, call.caller_past - visual.shape[1])
            visual = torch.cat([visual, between, call.visual], dim=1)
            seen = visual.cumsum(1)[:, -call.columns :] > 0
        else:
            seen = visual.any(1, keepdim=True)
        call.attention_run = AttentionRun(
            sequence=call.layer_run or self._sequence(call),
            visual=visual.to(call.device, non_blocking=True),
            sinks=sinks,
            asks=call.text.to(call.device, non_blocking=True) & seen.to(call.device, non_blocking=True),
            finds=visuals is not None,
            dimensions=None if marks is None else marks.dimensions,
        )

    def finish(self, call: LanguageModelCall, state: PrunedCacheState | None) -> PrunedCacheState | None:
        """Return what later calls with the same cache must know; `state` is what they must know of dropped tokens."""
        run = call.attention_run
        if run is None or not run.finds or run.dimensions is None:
            return state
        known = run.visual.shape[1]
        empty = run.visual.new_zeros(run.visual.shape)
        sinks = [run.sinks.get(layer, empty).to(run.visual.device) for layer in self.layers]
        marks = AttentionMarks(
            self.method.name,
            self.layers,
            run.visual,
            torch.stack(sinks, dim=1) if known else run.visual[:, None].expand(-1, len(self.layers), -1),
            run.dimensions.to(run.visual.device),
        )
        return replace(state or self._whole(call), marks=marks)

    def _sequence(self, call: LanguageModelCall) -> LayerRun:
        """Return the run of a call whose sequence is the same in every layer."""
        mask = call.mask
        return LayerRun(
            positions=call.positions,
            mask=mask.bool() if isinstance(mask, Tensor) and mask.ndim == 2 else None,
            caller_past=call.caller_past,
            state=call.state,
            method=self.method.name,
            drafts=call.drafts,
            entry=call.entry,
        )

    def _whole(self, call: LanguageModelCall) -> PrunedCacheState:
        """Return the state of a cache that holds every token."""
        past, mask, positions = call.caller_past, call.mask, call.positions
        group = LayerGroup(
            first_layer=0,
            cache_length=past + call.columns,
            valid=mask.bool() if isinstance(mask, Tensor) and not bool(call.valid.all() and not past) else None,
            removed=torch.zeros(call.batch, 1, dtype=torch.int64, device=call.device),
            columns=columns_held(None, past, call.batch, None, call.columns).to(call.device),
            lowered=positions_lowered(None, past, None, positions),
        )
        present = call.valid.to(call.device)
        highest = highest_positions(None, past, positions, present)
        return PrunedCacheState(self.method.name, past + call.columns, (group,), highest, tail_advances=not past)

    def _run(self) -> AttentionRun | None:
        call = self.calls.language_call
        return None if call is None else call.attention_run

    def _find_sinks(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._run()
        if run is None or not run.finds:
            return
        hidden = (args[0] if args else kwargs["hidden_states"]).detach()
        call = self.calls.language_call
        assert call is not None
        columns = run.own_columns.to(hidden.device)
        if hidden.shape[1] != columns.shape[1]:
            return
        alive = (columns >= 0) & call.valid.to(hidden.device).gather(1, columns.clamp(min=0))
        if run.dimensions is None:
            rows = torch.arange(len(hidden), device=hidden.device)
            run.dimensions = self.method.sink_dimensions(hidden[rows, alive.int().argmax(1)])
        found = self.method.find_sinks(hidden, run.dimensions.to(hidden.device)) & alive
        if call.drafts:
            found[:, -call.drafts :] = False
        run.mark_sinks(layer, found)

    def _enter_attention(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        run = self._run()
        if run is not None:
            run.captured = {name: kwargs.get(name) for name in ("position_embeddings", "past_key_values")}

    def _keep(self, layer: int, kind: str, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        run = self._run()
        if run is not None and (kind == "q_proj" or run.captured.get("past_key_values") is None):
            run.captured[kind] = output.detach()

    @torch.no_grad()
    def _added(self, run: AttentionRun, layer: int, attention: Any) -> tuple[Tensor, Tensor] | None:
        """Return the columns that change and by how much, `[rows]` and fp32 `[batch, rows, heads * head_dim]`."""
        captured, width = run.captured, run.sequence.width
        embeddings, cache = captured["position_embeddings"], captured["past_key_values"]
        entries = width if cache is None else int(cache.get_seq_length(layer))
        view = run.view(layer, entries - width)
        if not view.rows.numel():
            return None
        states = captured["q_proj"]
        device = states.device
        rows = view.rows.to(device)
        query = rotate(attention, states[:, rows], tuple(table[:, rows] for table in embeddings), "q_norm")
        if cache is None:
            key = rotate(attention, captured["k_proj"], embeddings, "k_norm")
            value = captured["v_proj"].unflatten(-1, (-1, attention.head_dim))
        else:
            key, value = (held.to(device) for held in self._held(cache, layer, entries))
        flags = run.flags(layer, view, SINK).to(device)
        delta = self.method.change(query, key, value, flags, view.last.to(device), float(attention.scaling))
        return rows, delta.flatten(2)

    def _held(self, cache: Any, layer: int, entries: int) -> tuple[Tensor, Tensor]:
        held = cache.layers[layer]
        keys, values = held.keys, held.values
        if keys.ndim != 4 or keys.shape[2] < entries:
            raise UnsupportedCallError(
                f"A {type(held).__name__} of {entries} entries does not give its keys back, and {self.method.name!r} needs them. "
                "Use the default dynamic cache."
            )
        return keys[:, :, :entries].transpose(1, 2), values[:, :, :entries].transpose(1, 2)

    def _change(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run()
        if run is None or "q_proj" not in run.captured:
            return None
        model: Any = self.family.language_model
        added = self._added(run, layer, model.layers[layer].self_attn)
        run.captured = {}
        if added is None:
            return None
        rows, delta = added
        output = args[0].clone()
        output[:, rows] = (output[:, rows].float() + delta).to(output.dtype)
        return (output, *args[1:]), kwargs
