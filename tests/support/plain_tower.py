"""What a vision tower computes for one image of an uncut LLaVA, by plain products: attention maps, keys, features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class PlainImage:
    """One image.

    Attributes:
        attention: per layer `[heads, tokens, tokens]`, softmaxed, the CLS token first where there is one.
        queries: per layer `[tokens, heads, head_dim]`.
        keys: per layer `[tokens, heads, head_dim]`.
        states: `[tokens, dim]`, the hidden state that the visual tokens are made from, CLS token included.
        features: `[patches, dim]`, the visual tokens as the language model gets them.
        cls: 1 where there is a CLS token, else 0.
        feature_layer: 0-based index of the layer whose output `states` is.
        project: the projector.
    """

    attention: list[Tensor]
    queries: list[Tensor]
    keys: list[Tensor]
    states: Tensor
    features: Tensor
    cls: int
    feature_layer: int
    project: Any

    @property
    def side(self) -> int:
        """Patches along a side."""
        return round(len(self.features) ** 0.5)

    def received(self, layer: int) -> Tensor:
        """Mean over heads and queries of what each patch gets."""
        return self.attention[layer].mean(0).mean(0)[self.cls :]

    def looked_at(self, layer: int) -> Tensor:
        """The CLS token's attention per head `[heads, patches]`, or what each patch gets where there is none."""
        attention = self.attention[layer]
        return attention[:, 0, 1:] if self.cls else attention.mean(1)


@torch.no_grad()
def plain_image(model: Any, pixels: Tensor) -> PlainImage:
    """Encode one image `[1, 3, height, width]` with the unpatched tower, attention layer by layer."""
    tower = model.model.vision_tower
    inner = getattr(tower, "vision_model", tower)
    states = tower(pixels, output_hidden_states=True).hidden_states
    attention, queries, keys = [], [], []
    for layer, state in zip(inner.encoder.layers, states, strict=False):
        module = layer.self_attn
        normed = layer.layer_norm1(state[0])
        query, key = (
            projection(normed).unflatten(-1, (module.num_heads, -1)) for projection in (module.q_proj, module.k_proj)
        )
        logits = torch.einsum("qhd,khd->hqk", query, key) * query.shape[-1] ** -0.5
        attention.append(logits.softmax(-1))
        queries.append(query)
        keys.append(key)
    chosen = model.config.vision_feature_layer % len(states)
    cls = int(hasattr(inner.embeddings, "class_embedding"))
    projector = model.model.multi_modal_projector
    return PlainImage(
        attention, queries, keys, states[chosen][0], projector(states[chosen][0, cls:]), cls, chosen - 1, projector
    )
