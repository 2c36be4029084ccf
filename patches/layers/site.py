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
from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.batch import Selection
from vlmprune.methods.layer_method import LayerBatch, LayerMethod, ProbedLayer
from vlmprune.methods.pipeline import Pipeline, check_call
from vlmprune.record import RunRecord

from ..cache.state import PrunedCacheState
from ..call_options import RowPipelines
from ..calls import CallStack, LanguageModelCall
from ..families.family import Family
from ..hooks import HookSet
from ..prefill.entry_cut import EntryCut
from ..prefill.packing import packed_prompts
from ..prefill.sequence_bounds import SEQUENCE_BOUNDS
from ..prefill.visuals import PrefillVisuals
from .run import LayerRun
from .scores import cached_keys, check_decoder, rotary_row, rotate
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
        self._probed: set[int] = set()

    @property
    def signal(self) -> str:
        """What the method scores by where its whole schedule is needed."""
        return self._attention_of(sorted(self._probed))

    def _attention_of(self, layers: Sequence[int]) -> str:
        whose = "last token" if self.method.reading.rows == "last token" else "text"
        return f"{whose} attention layer {', '.join(map(str, layers))}"

    def install(self, hooks: HookSet) -> None:
        """Register the hooks on layers and projections."""
        self.watch(self.method, hooks)

    def watch(self, method: LayerMethod, hooks: HookSet) -> None:
        """Register the hooks that `method` needs and that are not there yet; it differs from the site's own in `keep` alone.

        Raises:
            UnsupportedMethodError: the layers lack what dropping inside them needs.
        """
        model: Any = self.family.language_model
        before = self.method.reading.probe == "layer before"
        probed = {cut - before for cut in method.cut_layers(self.family.decoder_layers)}
        first = min(probed)
        check_decoder(model, range(first, self.family.decoder_layers), method.name)
        for layer in range(first, self.first_hooked):
            hooks.before(f"decoder layer {layer}", model.layers[layer], partial(self._enter_layer, layer))
        self.first_hooked = min(first, self.first_hooked)
        for layer in sorted(probed - self._probed):
            self._probed.add(layer)
            attention = model.layers[layer].self_attn
            if before:
                for kind in ("q_proj", "k_proj"):
                    projection = hooks.child(attention, kind)
                    hooks.after(f"decoder layer {layer} {kind}", projection, partial(self._capture, kind, layer))
            elif type(projection := hooks.child(attention, "k_proj")) is nn.Linear:
                hooks.before(f"decoder layer {layer} k_proj skipped", projection, partial(self._skip, layer))
                hooks.after(f"decoder layer {layer} k_proj reused", projection, partial(self._reuse, layer))

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
            check_call(self.method, set(visuals.modalities))
        if any(schedule) and packed_prompts(call, text_axis=self.family.text_positions) is not None:
            raise UnsupportedCallError(
                f"Several prompts are packed in one row, and {self.method.name!r} scores with the last token of a row; "
                "allowed: one prompt a row, or a method that selects before the language model."
            )
        run = self.layer_run(call)
        device = cut.columns.device
        last = (call.valid * torch.arange(call.columns)).amax(1)
        images = VisualTokens(
            rows=visuals.spans.rows,
            columns=list(cut.columns.split(counts)),
            index=[torch.arange(kept, device=device) if isinstance(kept, int) else kept for kept in cut.index],
            schedule=schedule,
            text=call.text.to(device, non_blocking=True),
            visual=call.visual.to(device, non_blocking=True),
            text_lengths=call.text.sum(1).tolist(),
            visual_lengths=call.visual.sum(1).tolist(),
        )
        run = replace(run, images=images, entry=cut.compaction, last_column=last.to(device, non_blocking=True))
        run.group_inputs(0, call.past)
        call.layer_run = run
        return self.hold_back_deepstack(run, arguments)

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
            compact_entry=self.compact_entry,
            compact_layers=self.compact,
            record=call.record,
        )

    @staticmethod
    def check_continues(site: LayerSite | None, state: PrunedCacheState, pipeline: Pipeline) -> None:
        """Raise UnsupportedCallError unless `site` watches the layers that hold other tokens than the first."""
        if len(state.layer_groups) == 1:
            return
        first = state.layer_groups[1].first_layer
        if site is None or site.first_hooked > first:
            raise UnsupportedCallError(
                f"The cache was pruned from layer {first} on, where {pipeline.name!r} as it is applied now changes nothing; "
                "continue it with the method and the parameters that made it."
            )

    def _schedule(self, count: int, method: LayerMethod | None) -> dict[int, int | None]:
        """Return the layers at which an image of `count` tokens is cut, and to how many (None: the method decides)."""
        alive, wanted = count, {}
        for cut in method.schedule(count, self.family.decoder_layers) if method is not None else ():
            if cut.tokens is None or cut.tokens < alive:
                wanted[cut.layer] = cut.tokens
                alive = cut.tokens or 0
        return wanted

    def hold_back_deepstack(self, run: LayerRun, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take away the deep visual features that the host would add by its own columns after the first cut."""
        features = kwargs.get("deepstack_visual_embeds")
        if features is None or run.images is None:
            return kwargs
        first = min((layer for cuts in run.images.schedule for layer in cuts), default=len(features))
        run.deepstack = dict(enumerate(features))
        for layer in range(min(first, len(features))):
            del run.deepstack[layer]
        return {**kwargs, "deepstack_visual_embeds": list(features)[:first]} if run.deepstack else kwargs

    def finish_record(self, run: LayerRun) -> RunRecord:
        """Return the record of a finished prefill, with what every layer saw."""
        record: RunRecord = run.record
        if run.scored:
            signals = [record.signal, self._attention_of(run.scored)]
            record = replace(record, signal=", ".join(signal for signal in signals if signal))
        assert run.images is not None
        per_layer = [list(row) for row in record.visual_tokens_per_layer]
        for first, compaction in run.cuts:
            for row, (total, removed) in enumerate(zip(run.images.visual_lengths, compaction.removed, strict=True)):
                per_layer[row][first:] = [total - removed] * (len(per_layer[row]) - first)
        if not run.cuts:
            return record
        return replace(
            record,
            visual_tokens_per_layer=per_layer,
            kept_per_image=run.images.index,
            kept_by_stage=((0, record.kept_per_image), *run.kept_by_cut),
        )

    def _enter_layer(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run()
        if run is None:
            return None
        hidden = args[0] if args else kwargs["hidden_states"]
        entering = hidden
        if run.inputs is not None:
            kwargs = {**kwargs, **run.inputs}
        if layer - 1 in run.deepstack:
            hidden = self._add_deepstack(run, hidden, run.deepstack[layer - 1])
        if layer in run.boundaries:
            hidden, kwargs = self._change(run, layer, hidden, kwargs)
        if self.method.reading.probe == "layer before" and layer + 1 in run.boundaries:
            run.captured["position_embeddings"] = kwargs["position_embeddings"]
        if run.inputs is None and hidden is entering:
            return None
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    def _change(
        self, run: LayerRun, layer: int, hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, dict[str, Any]]:
        cut = False
        if run.images is not None:
            chosen = run.images.images_at(layer)
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
            "position_embeddings": model.rotary_emb(hidden, self._rotary_positions(positions)),
            # Those of the entry are too long now.
            **{name: None for name in SEQUENCE_BOUNDS if name in kwargs},
        }
        return hidden, {**kwargs, **run.inputs}

    def _gapless(self, run: LayerRun) -> bool:
        return run.compact_layers and (run.entry is None or run.compact_entry)

    def _rotary_positions(self, positions: Tensor) -> Tensor:
        if not self.family.mrope:
            return positions
        if positions.ndim == 2:
            return positions[None].expand(3, -1, -1)
        return positions[1:] if positions.shape[0] == 4 else positions

    def _cut(
        self, run: LayerRun, layer: int, chosen: list[int], hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[Tensor, bool]:
        assert run.images is not None
        images = run.images
        run.scored.append(layer - (self.method.reading.probe == "layer before"))
        with torch.no_grad():
            batch, keys = self._batch(run, layer, chosen, hidden, kwargs)
            selection = self.method.select_at_layer(batch)
        if selection.counts == batch.counts:
            return hidden, False
        self._keep(images, chosen, selection)
        shorter, source = run.compact(hidden)
        assert run.compaction is not None
        run.cuts.append((layer, run.compaction))
        run.kept_by_cut.append((layer, list(images.index)))
        if keys is not None and not torch.is_grad_enabled():
            run.projected_keys = (layer, keys[torch.arange(run.batch, device=keys.device)[:, None], source])
        return shorter, True

    @staticmethod
    def _keep(images: VisualTokens, chosen: list[int], selection: Selection) -> None:
        for image, kept in zip(chosen, selection.kept.split(list(selection.counts)), strict=True):
            images.columns[image] = images.columns[image][kept]
            images.index[image] = images.index[image][kept]

    def _batch(
        self, run: LayerRun, layer: int, chosen: list[int], hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[LayerBatch, Tensor | None]:
        assert run.images is not None
        images = run.images
        model: Any = self.family.language_model
        before = self.method.reading.probe == "layer before"
        probed = layer - before
        attention = model.layers[probed].self_attn
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length(probed)) - (run.width if before else 0)
        projected = None
        if before:
            embeddings, query_states, key_states = (
                run.captured[name] for name in ("position_embeddings", "q_proj", "k_proj")
            )
        else:
            embeddings = kwargs["position_embeddings"]
            normed = model.layers[probed].input_layernorm(hidden)
            key_states = projected = attention.k_proj(normed)
            rows = torch.arange(run.batch, device=hidden.device)
            query_states = attention.q_proj(normed[rows, run.last_tokens()])
        key = rotate(attention, key_states, embeddings, "k_norm")
        earlier = cached_keys(cache, probed, past)
        if earlier is not None:
            key = torch.cat([earlier, key], dim=1)
        valid = run.valid_columns(probed, past)
        batch = LayerBatch(
            layer=layer,
            counts=tuple(images.counts[image] for image in chosen),
            budgets=tuple(images.schedule[image][layer] for image in chosen),
            rows=tuple(images.rows[image] for image in chosen),
        )
        if self.method.reading.rows == "all tokens":
            query = rotate(attention, query_states, embeddings, "q_norm")
            return replace(
                batch, probed=ProbedLayer(query, key, run.token_kinds(past, valid), attention.scaling)
            ), projected
        query = rotary_row(attention, query_states, embeddings, run.last_tokens())
        scores = row_attention(query, key, scale=attention.scaling, mask=valid, reduce="mean")[:, 0, past:]
        columns = torch.cat([images.columns[image] for image in chosen])
        return replace(batch, attention=scores.flatten()[run.current(columns)]), projected

    @staticmethod
    def _add_deepstack(run: LayerRun, hidden: Tensor, features: Tensor) -> Tensor:
        assert run.images is not None
        columns = torch.cat(run.images.columns)
        source = torch.searchsorted(run.entry_columns, columns)
        added = hidden.flatten(0, 1).index_add(0, run.current(columns), features[source].to(hidden))
        return added.view_as(hidden)

    def _capture(self, kind: str, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        whole = kind == "k_proj" or self.method.reading.rows == "all tokens"
        run = self._run()
        if run is None or run.images is None or not run.images.images_at(layer + 1):
            return
        rows = torch.arange(run.batch, device=output.device)
        run.captured[kind] = output.detach() if whole else output.detach()[rows, run.last_tokens()]

    def _skip(self, layer: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        run = self._run()
        if run is None or run.projected_keys is None or run.projected_keys[0] != layer:
            return None
        return (args[0][:, :0], *args[1:]), kwargs

    def _reuse(self, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        run = self._run()
        if run is None or run.projected_keys is None or run.projected_keys[0] != layer:
            return None
        keys, run.projected_keys = run.projected_keys[1], None
        return keys

    def _run(self) -> LayerRun | None:
        call = self.calls.language_call
        return None if call is None else call.layer_run
