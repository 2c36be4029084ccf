"""The prefill that pruning aims at: the unpatched model given just the tokens that are kept."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from vlmprune.eval.models.visual_tokens import visual_tokens as _placeholders


def encode_images(model: PreTrainedModel, inputs: Mapping[str, Any]) -> Any:
    """Tower and projector for all pictures, or all videos, of `inputs`, as the model's own `get_image_features` gives them."""
    name = "get_video_features" if inputs.get("pixel_values_videos") is not None else "get_image_features"
    call = getattr(model.model, name)
    names = inspect.signature(getattr(type(model.model), name)).parameters
    return call(**{name: inputs[name] for name in names if name in inputs}, return_dict=True)


@dataclass(frozen=True)
class IdealPrefill:
    """A prefill of made-up embeddings of the right number; `run` is what is timed.

    `embeddings` [batch, tokens, dim] hold the text and the visual tokens that enter the first layer, `visual` [batch, tokens]
    says which are which; before each layer the sequence is cut to its length in `lengths` [layers].
    """

    model: PreTrainedModel
    inputs: Mapping[str, Any]
    embeddings: Tensor
    visual: Tensor
    lengths: Sequence[int]

    @classmethod
    def prepare(cls, model: PreTrainedModel, inputs: Mapping[str, Any], visual_tokens: Sequence[int]) -> IdealPrefill:
        """From a request whose rows have one picture of one size each; layers see `visual_tokens` [layers] of each row's."""
        ids = inputs["input_ids"]
        is_visual = _placeholders(model.config, ids)
        columns = ~is_visual[0] | (is_visual[0].cumsum(0) <= visual_tokens[0])
        text = int((~is_visual[0]).sum())
        embeddings = model.get_input_embeddings()(ids[:, columns])
        return cls(model, inputs, embeddings, is_visual[:, columns], [count + text for count in visual_tokens])

    def run(self) -> Tensor:
        """Tower, projector, language model, and the logits of the last token [batch, 1, vocabulary]."""
        return self.after_tower(encode_images(self.model, self.inputs))

    def after_tower(self, encoded: Any) -> Tensor:
        """The same without tower and projector, whose output is given."""
        language = self.model.model.language_model
        deep = self._deep_features(encoded)
        if len(set(self.lengths)) == 1:
            extra = {"visual_pos_masks": self.visual, "deepstack_visual_embeds": deep} if deep else {}
            hidden = language(inputs_embeds=self.embeddings, use_cache=True, **extra).last_hidden_state
        else:
            hidden = self._staged(language, deep)
        logits: Tensor = self.model.lm_head(hidden[:, -1:])
        return logits

    def _deep_features(self, encoded: Any) -> list[Tensor]:
        """Features of deeper tower layers (Qwen3-VL) of as many tokens as enter."""
        kept = int(self.visual[0].sum())
        rows = len(self.visual)
        found = getattr(encoded, "deepstack_features", None) or []
        whole = [features if isinstance(features, Tensor) else torch.cat(features) for features in found]
        return [features.unflatten(0, (rows, -1))[:, :kept].flatten(0, 1) for features in whole]

    def _staged(self, language: Any, deep: Sequence[Tensor]) -> Tensor:
        cache = DynamicCache(config=language.config)
        hidden, positions, rotary = self.embeddings, None, None
        sections = (getattr(language.config, "rope_parameters", None) or {}).get("mrope_section")
        for index, (layer, length) in enumerate(zip(language.layers, self.lengths, strict=True)):
            if positions is None or length != hidden.shape[1]:
                hidden = hidden[:, :length]
                positions = torch.arange(length, device=hidden.device)[None]
                rotary = language.rotary_emb(hidden, positions.expand(3, 1, -1) if sections else positions)
            hidden = layer(
                hidden, position_ids=positions, past_key_values=cache, position_embeddings=rotary, use_cache=True
            )
            if index < len(deep):
                mask = self.visual[:, :length]
                hidden = hidden.clone()
                hidden[mask] += deep[index][: int(mask.sum())]
        normed: Tensor = language.norm(hidden)
        return normed
