"""Reading attention of decoder layers, from the queries and keys that their own modules make."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.kernels.row_attention import row_attention
from vlmprune.methods.layer_method import LayerBatch, LayerMethod, ProbedLayer

from ..calls import CallStack
from ..families.family import Family
from ..hooks import HookSet
from .run import LayerRun
from .scores import cached_keys, rotary_row, rotate


class LayerProbe:
    """What a method reads of the layers it cuts, or of those before them; the layers keep their attention backend.

    Queries and keys of the layer before a cut are captured as the layer makes them. Those of the cut layer itself are
    projected ahead of it, for the tokens that it may lose; what is left of its keys is then not projected again.
    """

    def __init__(self, family: Family, method: LayerMethod, calls: CallStack) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.before = method.reading.probe == "layer before"
        self.watched: set[int] = set()

    def signal(self, layers: Sequence[int] | None = None) -> str:
        """Return in words what the method scores by, in `layers` or in all that are watched."""
        whose = "last token" if self.method.reading.rows == "last token" else "text"
        return f"{whose} attention layer {', '.join(map(str, sorted(self.watched) if layers is None else layers))}"

    def layer_of(self, cut: int) -> int:
        """Return the layer that is read for a cut at the input of layer `cut`."""
        return cut - self.before

    def watch(self, layers: Collection[int], hooks: HookSet) -> None:
        """Register the hooks on the projections of `layers` that are not there yet."""
        model: Any = self.family.language_model
        for layer in sorted(set(layers) - self.watched):
            self.watched.add(layer)
            attention = model.layers[layer].self_attn
            if self.before:
                for kind in ("q_proj", "k_proj"):
                    projection = hooks.child(attention, kind)
                    hooks.after(f"decoder layer {layer} {kind}", projection, partial(self._capture, kind, layer))
            elif type(projection := hooks.child(attention, "k_proj")) is nn.Linear:
                hooks.before(f"decoder layer {layer} k_proj skipped", projection, partial(self._skip, layer))
                hooks.after(f"decoder layer {layer} k_proj reused", projection, partial(self._reuse, layer))

    def enter_layer(self, run: LayerRun, layer: int, kwargs: dict[str, Any]) -> None:
        """Keep what a layer was given, where the cut after it needs that."""
        if self.before and layer + 1 in run.boundaries:
            run.captured["position_embeddings"] = kwargs["position_embeddings"]

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
        images = run.cut_images
        run.scored.append(self.layer_of(layer))
        model: Any = self.family.language_model
        probed, before = self.layer_of(layer), self.before
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
        valid = run.scored_columns(probed, past)
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
