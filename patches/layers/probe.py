"""Reading attention of decoder layers, from the queries and keys that their own modules make."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.layer_batch import LayerBatch, LayerSignal, ProbedLayer
from vlmprune.methods.layer_method import LayerMethod
from vlmprune.methods.needs import LayerNeed

from ..calls import CallStack
from ..families.family import Family
from ..hooks import HookSet
from ..rotation import rotate, rotate_heads
from .batch_parts import batch_parts
from .run import LayerRun
from .scores import cached_keys, rotary_row

_WORDS = {
    "last token": "last token attention",
    "text": "text attention",
    "visual": "visual attention",
    "all tokens": "text attention",
}


class LayerProbe:
    """What a method reads of the layers it cuts, or of those before them; the layers keep their attention backend.

    Queries and keys of the layer before a cut are captured as the layer makes them. Those of the cut layer itself are
    projected ahead of it, for the tokens that it may lose; what is left of its keys is then not projected again.
    """

    def __init__(self, family: Family, method: LayerMethod, calls: CallStack) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.watched: set[tuple[str, int]] = set()
        self.scored: dict[int, str] = {}

    def signal(self, layers: Sequence[int] | None = None) -> str:
        """Return in words what the method scores by, in `layers` or in all that are watched."""
        words: dict[str, list[str]] = {}
        for layer in sorted(self.scored) if layers is None else layers:
            words.setdefault(self.scored[layer], []).append(str(layer))
        return ", ".join(f"{name} layer {', '.join(numbers)}" for name, numbers in words.items())

    def need(self, cut: int) -> LayerNeed:
        """Return what is read for a cut at the input of layer `cut`."""
        return self.method.reading_at(cut, self.family.decoder_layers)

    def layer_of(self, cut: int) -> int:
        """Return the layer that is read for a cut at the input of layer `cut`."""
        return cut - (self.need(cut).probe == "layer before")

    def watch(self, method: LayerMethod, hooks: HookSet) -> None:
        """Register the hooks on the projections that the cuts of `method` need and that are not there yet."""
        for cut in method.cut_layers(self.family.decoder_layers):
            need, layer = self.need(cut), self.layer_of(cut)
            self.scored[layer] = _WORDS.get(need.rows, "keys" if need.keys else "hidden states")
            if not need.keys:
                continue
            if need.probe == "layer before":
                kinds = ["k_proj"] + ["q_proj"] * (need.rows != "none") + ["v_proj"] * need.values
                for kind in kinds:
                    self._capture_after(kind, layer, hooks)
            else:
                self._project_once(layer, hooks)
        for signal in method.layer_signals(self.family.decoder_layers):
            if signal.kind == "last_token_attention":
                for kind in ("q_proj", "k_proj"):
                    self._capture_after(kind, signal.layer, hooks)

    def enter_layer(self, run: LayerRun, layer: int, kwargs: dict[str, Any]) -> None:
        """Keep what a layer was given, where something is read of it later."""
        if ("k_proj", layer) in self.watched and self._reads(run, layer):
            run.captured["position_embeddings", layer] = kwargs["position_embeddings"]

    def read(
        self, run: LayerRun, layer: int, chosen: list[int], hidden: Tensor, kwargs: dict[str, Any]
    ) -> tuple[LayerBatch, Tensor | None]:
        """Return what the method is shown of a cut at the input of `layer`.

        Args:
            run: the running call.
            layer: the layer that is cut.
            chosen: the images that are cut.
            hidden: the states that enter it, `[batch, width, dim]`.
            kwargs: its other arguments.

        Returns:
            The batch, and the keys of `layer` before rotation `[batch, width, dim]` if they were projected ahead of it.
        """
        need, layers = self.need(layer), self.family.decoder_layers
        run.scored.append(self.layer_of(layer))
        model: Any = self.family.language_model
        signals = [signal for signal in self.method.layer_signals(layers) if signal.layer < layer]
        given: dict[str, Any] = batch_parts(run, layer, chosen, hidden, signals, model.norm)
        projected = None
        if need.keys and need.probe == "layer before":
            given |= self._captured(run, layer - 1, need, chosen, kwargs)
        elif need.keys:
            given["probed"], given["attention"], projected = self._ahead(run, layer, need, chosen, hidden, kwargs)
        return LayerBatch(layer=layer, layers=layers, **given), projected

    def last_token_attention(self, run: LayerRun, layer: int, kwargs: dict[str, Any]) -> Tensor:
        """Return the attention of each row's last prompt token in a captured layer, fp32 `[batch, width]`."""
        attention = self._attention(layer)
        past, earlier = self._earlier(run, layer, kwargs, ran=True)
        # A cut right after the layer reads them once more.
        names = ("position_embeddings", "k_proj", "q_proj")
        embeddings, key_states, query_states = (run.captured[name, layer] for name in names)
        if not run.cut_images.images_at(layer + 1):
            for name in names:
                del run.captured[name, layer]
        if query_states.ndim == 3:
            query_states = query_states[torch.arange(run.batch, device=query_states.device), run.last_tokens()]
        key = self._key(attention, key_states, embeddings, earlier)
        query = rotary_row(attention, query_states, embeddings, run.last_tokens())
        return self._last_row(run, attention, query, key, run.scored_columns(layer, past), past)

    def _captured(
        self, run: LayerRun, layer: int, need: LayerNeed, chosen: list[int], kwargs: dict[str, Any]
    ) -> dict[str, Any]:
        """Return what is read of `layer`, which has just run."""
        attention = self._attention(layer)
        embeddings, key_states, query_states, value_states = (
            run.captured.pop((name, layer), None) for name in ("position_embeddings", "k_proj", "q_proj", "v_proj")
        )
        past, earlier = self._earlier(run, layer, kwargs, ran=True)
        key = self._key(attention, key_states, embeddings, earlier)
        valid = run.scored_columns(layer, past)

        def queries(row: int, places: Tensor) -> Tensor:
            tables = tuple(table[min(row, len(table) - 1)][None, places] for table in embeddings)
            rotated: Tensor = rotate(attention, query_states[row, places][None], tables, "q_norm")[0]
            return rotated

        whole = need.rows == "all tokens"
        probed = self._probed(
            run,
            layer,
            embeddings,
            query=rotate(attention, query_states, embeddings, "q_norm") if whole else None,
            key=key,
            kinds=run.token_kinds(past, valid) if whole else None,
            valid=valid,
            key_states=key_states,
            value=value_states.unflatten(-1, (-1, attention.head_dim)) if need.values else None,
            read_queries=queries if need.rows in ("text", "visual") else None,
        )
        if need.rows != "last token":
            return {"probed": probed}
        query = rotary_row(attention, query_states, embeddings, run.last_tokens())
        scores = self._last_row(run, attention, query, key, valid, past)
        return {"probed": probed, "attention": scores.flatten()[self._flat(run, chosen)]}

    def _ahead(
        self,
        run: LayerRun,
        layer: int,
        need: LayerNeed,
        chosen: list[int],
        hidden: Tensor,
        kwargs: dict[str, Any],
    ) -> tuple[ProbedLayer, Tensor | None, Tensor]:
        """Return what is read of `layer`, which is about to run: the layer, scores by the last token, projected keys."""
        model: Any = self.family.language_model
        attention, embeddings = self._attention(layer), kwargs["position_embeddings"]
        normed = model.layers[layer].input_layernorm(hidden)
        key_states = attention.k_proj(normed)
        past, earlier = self._earlier(run, layer, kwargs, ran=False)
        key = self._key(attention, key_states, embeddings, earlier)
        valid = run.scored_columns(layer, past)

        def queries(row: int, places: Tensor) -> Tensor:
            tables = tuple(table[min(row, len(table) - 1)][None, places] for table in embeddings)
            states = attention.q_proj(normed[row, places][None])
            rotated: Tensor = rotate(attention, states, tables, "q_norm")[0]
            return rotated

        whole = need.rows == "all tokens"
        probed = self._probed(
            run,
            layer,
            embeddings,
            query=rotate(attention, attention.q_proj(normed), embeddings, "q_norm") if whole else None,
            key=key,
            kinds=run.token_kinds(past, valid) if whole else None,
            valid=valid,
            key_states=key_states,
            read_queries=queries if need.rows in ("text", "visual") else None,
        )
        if need.rows != "last token":
            return probed, None, key_states
        rows = torch.arange(run.batch, device=hidden.device)
        states = attention.q_proj(normed[rows, run.last_tokens()])
        query = rotary_row(attention, states, embeddings, run.last_tokens())
        scores = self._last_row(run, attention, query, key, valid, past)
        return probed, scores.flatten()[self._flat(run, chosen)], key_states

    def _probed(self, run: LayerRun, layer: int, embeddings: tuple[Tensor, Tensor], **parts: Any) -> ProbedLayer:
        model: Any = self.family.language_model
        attention, key, states = self._attention(layer), parts["key"], parts["key_states"]

        def counted_key() -> Tensor:
            if run.padding_before is None:
                return key[:, key.shape[1] - run.width :]
            tables = model.rotary_emb(states, run.current_positions(layer).clamp(min=0))
            return rotate(attention, states, tables, "k_norm")

        return ProbedLayer(
            scale=attention.scaling,
            inverse_frequencies=getattr(model.rotary_emb, "inv_freq", None),
            read_positions=partial(run.current_positions, layer),
            read_counted_key=counted_key,
            read_rotation=lambda states: rotate_heads(attention, states, embeddings),
            **parts,
        )

    def _attention(self, layer: int) -> Any:
        model: Any = self.family.language_model
        return model.layers[layer].self_attn

    def _earlier(self, run: LayerRun, layer: int, kwargs: dict[str, Any], *, ran: bool) -> tuple[int, Tensor | None]:
        """Return how many entries the layer's cache holds of earlier turns, and their keys."""
        cache = kwargs.get("past_key_values")
        past = 0 if cache is None else int(cache.get_seq_length(layer)) - (run.width if ran else 0)
        return past, cached_keys(cache, layer, past)

    def _key(self, attention: Any, states: Tensor, embeddings: tuple[Tensor, Tensor], earlier: Tensor | None) -> Tensor:
        key = rotate(attention, states, embeddings, "k_norm")
        return key if earlier is None else torch.cat([earlier, key], dim=1)

    def _last_row(
        self, run: LayerRun, attention: Any, query: Tensor, key: Tensor, valid: Tensor | None, past: int
    ) -> Tensor:
        return row_attention(query, key, scale=attention.scaling, mask=valid, reduce="mean")[:, 0, past:]

    def _flat(self, run: LayerRun, chosen: list[int]) -> Tensor:
        return run.current(torch.cat([run.cut_images.columns[image] for image in chosen]))

    def _capture_after(self, kind: str, layer: int, hooks: HookSet) -> None:
        if (kind, layer) not in self.watched:
            self.watched.add((kind, layer))
            projection = hooks.child(self._attention(layer), kind)
            hooks.after(f"decoder layer {layer} {kind}", projection, partial(self._capture, kind, layer))

    def _project_once(self, layer: int, hooks: HookSet) -> None:
        if ("ahead", layer) in self.watched:
            return
        self.watched.add(("ahead", layer))
        if type(projection := hooks.child(self._attention(layer), "k_proj")) is nn.Linear:
            hooks.before(f"decoder layer {layer} k_proj skipped", projection, partial(self._skip, layer))
            hooks.after(f"decoder layer {layer} k_proj reused", projection, partial(self._reuse, layer))

    def _reads(self, run: LayerRun, layer: int) -> bool:
        """Return whether something of `layer`, now running, is read later in this call."""
        if run.images is None:
            return False
        if LayerSignal("last_token_attention", layer) in self.method.layer_signals(self.family.decoder_layers):
            return run.images.cut_after(layer)
        return bool(run.images.images_at(layer + 1))

    def _capture(self, kind: str, layer: int, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        run = self._run()
        if run is None or not self._reads(run, layer):
            return
        whole = kind != "q_proj" or (
            layer + 1 < self.family.decoder_layers
            and bool(run.cut_images.images_at(layer + 1))
            and self.need(layer + 1).rows != "last token"
        )
        rows = torch.arange(run.batch, device=output.device)
        run.captured[kind, layer] = output.detach() if whole else output.detach()[rows, run.last_tokens()]

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
