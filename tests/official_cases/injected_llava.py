"""A real LLaVA whose embeddings are the tensors of a case: text through the embedding table, images through the projector."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

_TOWER = CLIPVisionConfig(
    hidden_size=8,
    intermediate_size=8,
    num_hidden_layers=1,
    num_attention_heads=1,
    image_size=4,
    patch_size=2,
    projection_dim=8,
)


class GivenFeatures(nn.Module):
    """A projector that returns the features of a case, whatever the pixels."""

    def __init__(self, features: Sequence[Tensor]) -> None:
        super().__init__()
        self.features = list(features)

    def forward(self, hidden: Tensor) -> list[Tensor]:
        return self.features


class InjectedLlava:
    """The model, and the inputs that make its language model see the embeddings of a case.

    Args:
        embeddings: `[batch, tokens, dim]`, what the language model sees.
        mask: int64 `[batch, tokens]`.
        spans: per row the start and the number of visual tokens; None for a row without image.
        later: `[steps, 1, dim]`, embeddings of the tokens that are decoded.
        text: what the configuration of the language model needs.
        weights: weights of the language model by name.
    """

    def __init__(
        self,
        embeddings: Tensor,
        mask: Tensor,
        spans: Sequence[tuple[int, int] | None],
        text: Mapping[str, Any],
        weights: Mapping[str, Tensor],
        later: Tensor | None = None,
    ) -> None:
        batch, tokens, dim = embeddings.shape
        later = embeddings.new_zeros(0, 1, dim) if later is None else later
        table = torch.cat([embeddings.flatten(0, 1), later.flatten(0, 1), embeddings.new_zeros(1, dim)])
        image = len(table) - 1
        ids = torch.arange(batch * tokens).view(batch, tokens)
        features = []
        for row, span in enumerate(spans):
            if span is not None:
                features.append(embeddings[row, span[0] : sum(span)])
                ids[row, span[0] : sum(span)] = image
        self.spans = spans
        self.later_ids = batch * tokens + torch.arange(len(later))
        self.inputs = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.zeros(len(features), 3, 4, 4)}
        config = LlavaConfig(
            vision_config=_TOWER.to_dict(),
            text_config=LlamaConfig(vocab_size=len(table), hidden_size=dim, **text).to_dict(),
            image_token_index=image,
        )
        self.model = LlavaForConditionalGeneration(config).eval()
        self.model.model.multi_modal_projector = GivenFeatures(features)
        language_model = self.model.model.language_model
        language_model.load_state_dict({"embed_tokens.weight": table, **weights}, strict=True)
        self.seen: list[dict[str, Any]] = []

    def watch(self) -> None:
        """Note from now on what every decoder layer is given: hidden states, and the positions behind its rotary tables."""
        language_model = self.model.model.language_model
        # Not through the module's call, where hooks may let several groups of layers share it.
        ids = torch.arange(language_model.config.max_position_embeddings)[None]
        known = torch.cat(language_model.rotary_emb.forward(torch.zeros(1, 1, 1), ids), -1)[0]

        def note(module: nn.Module, args: Any, kwargs: Any) -> None:
            tables = torch.cat(kwargs["position_embeddings"], -1)
            self.seen.append({"hidden": args[0], "positions": torch.cdist(tables, known[None]).argmin(-1)})

        for layer in language_model.layers:
            layer.register_forward_pre_hook(note, with_kwargs=True)

    def take_seen(self) -> list[dict[str, Any]]:
        """Return what the layers were given since the last time."""
        seen, self.seen = self.seen, []
        return seen


def cache_lengths(cache: Any) -> Tensor:
    """Return the entries of every layer's cache, int64 `[layers]`."""
    return torch.tensor([layer.keys.shape[-2] for layer in cache.layers])
