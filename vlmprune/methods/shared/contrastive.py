"""A contrastive model (CLIP) whose text tower says how much each patch has to do with a question."""

from __future__ import annotations

from os import PathLike
from typing import Any

import torch
from torch import Tensor

from vlmprune.errors import ParameterError


class ContrastiveTower:
    """A CLIP model with its tokenizer, which belong to the vision tower.

    Args:
        source: folder or name of a CLIP model with a tokenizer, or the two as a pair (model, tokenizer).

    Raises:
        ParameterError: `source` is neither, cannot be loaded, or has no text tower and projections.
    """

    def __init__(self, source: Any) -> None:
        if isinstance(source, (str, PathLike)):
            source = _loaded(source)
        if not isinstance(source, (tuple, list)) or len(source) != 2:
            raise ParameterError(
                f"text_tower={source!r}; allowed: a folder or hub name of a CLIP model, or a pair (CLIPModel, its tokenizer)."
            )
        self.model, self.tokenizer = source
        for part in ("text_model", "text_projection", "visual_projection", "vision_model"):
            if not hasattr(self.model, part):
                raise ParameterError(
                    f"text_tower is a {type(self.model).__name__} without `{part}`; allowed: a CLIPModel, which has text "
                    "tower and both projections."
                )

    @torch.no_grad()
    def text(self, question: str, device: torch.device) -> Tensor:
        """Return the question's embeddings, fp32 `[segments, dim]`, a segment for every 77 tokens.

        The ids, begin and end marks included, are not cut; the last segment is filled with zeros, as in CDPruner's code.
        """
        ids = self._ids(question)
        ids = torch.nn.functional.pad(ids, (0, -len(ids) % self._length)).view(-1, self._length)
        pooled = self.model.text_model(input_ids=ids.to(self.model.text_projection.weight.device)).pooler_output
        embeddings: Tensor = self.model.text_projection(pooled)
        return embeddings.float().to(device)

    @torch.no_grad()
    def last_place(self, question: str, device: torch.device) -> Tensor:
        """Return the embedding of the last place of the question filled up to 77 tokens, fp32 `[1, dim]`."""
        ids = self._ids(question)[: self._length]
        fill = getattr(self.tokenizer, "pad_token_id", None) or 0
        ids = torch.nn.functional.pad(ids, (0, self._length - len(ids)), value=fill)[None]
        states = self.model.text_model(input_ids=ids.to(self.model.text_projection.weight.device)).last_hidden_state
        embeddings: Tensor = self.model.text_projection(states[:, -1])
        return embeddings.float().to(device)

    @property
    def _length(self) -> int:
        return int(self.model.config.text_config.max_position_embeddings)

    def _ids(self, question: str) -> Tensor:
        return torch.tensor(self.tokenizer(question)["input_ids"], dtype=torch.int64)

    @torch.no_grad()
    def patches(self, features: Tensor, *, normed: bool = True) -> Tensor:
        """Return what the patches are in the same space, fp32 `[patches, dim]`.

        Args:
            features: `[patches, tower_dim]`, a hidden state of the vision tower.
            normed: whether it goes through the tower's last norm first.

        Raises:
            ParameterError: the model's vision tower has another width.
        """
        norm, projection = self.model.vision_model.post_layernorm, self.model.visual_projection
        width = int(projection.weight.shape[1])
        if features.shape[1] != width:
            raise ParameterError(
                f"text_tower belongs to a vision tower of width {width}, the features of this model have {features.shape[1]}; "
                "allowed: the CLIP model that the vision tower was taken from."
            )
        parameter = next(projection.parameters())
        states = features.to(parameter.device, parameter.dtype)
        embeddings: Tensor = projection(norm(states) if normed else states)
        return embeddings.float().to(features.device)


def _loaded(source: str | PathLike[str]) -> tuple[Any, Any]:
    """The CLIP model and the tokenizer of a folder or hub name."""
    from transformers import AutoTokenizer, CLIPModel

    allowed = "allowed: a folder or hub name of a CLIP model with its tokenizer, or a pair (CLIPModel, its tokenizer)."
    try:
        model, info = CLIPModel.from_pretrained(source, output_loading_info=True)
        tokenizer = AutoTokenizer.from_pretrained(source)
    except Exception as error:
        first = (str(error).strip().splitlines() or [""])[0]
        raise ParameterError(
            f"text_tower={str(source)!r} cannot be loaded as a CLIP model: {type(error).__name__}: {first} {allowed}"
        ) from error
    # Of another architecture everything is missing, and what is missing would be made up.
    lost = sorted(str(key) for key in [*info["missing_keys"], *info["mismatched_keys"]])
    if lost:
        raise ParameterError(
            f"text_tower={str(source)!r} lacks {len(lost)} of a CLIP model's weights, {lost[0]!r} first; {allowed}"
        )
    return model.eval(), tokenizer
