"""Whether the features of the encoder stand where the placeholders were, of a class that only looking at it tells of."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vlmprune.errors import LayoutError

from ..calls import LanguageModelCall
from ..families.family import Family
from .image_spans import columns_of
from .visuals import PrefillVisuals

_ALIKE = 0.99


def check_placed(family: Family, call: LanguageModelCall, visuals: PrefillVisuals) -> None:
    """Check that the embeddings at the placeholders are the features in prompt order, scaled or added to the placeholder's own.

    Raises:
        LayoutError: they are something else, so that dropping one would drop another token than was selected.
    """
    tokens = (
        call.tokens.detach().flatten(0, 1)[columns_of(visuals.spans.first_of, visuals.spans).to(call.device)].float()
    )
    shown = [
        shown.visuals.features[image].reshape(-1, tokens.shape[-1])
        for shown in visuals.encoded
        for image in shown.images
        if shown.visuals.features[image].shape[-1] == tokens.shape[-1]
    ]
    features = torch.cat([feature.detach().to(tokens) for feature in shown]) if shown else tokens[:0]
    if features.shape == tokens.shape:
        if _alike(tokens, features):
            return
        table: Any = family.multimodal_model.get_input_embeddings()  # type: ignore[operator]
        ids = torch.tensor(
            [family.placeholder_id(modality) for modality in visuals.modalities], device=table.weight.device
        )
        counts = torch.tensor([visuals.spans.counts[image] for image in visuals.spans.first_of], device=ids.device)
        if _alike(tokens - table(ids.repeat_interleave(counts)).to(tokens), features):
            return
    raise LayoutError(
        f"The embeddings of {family.name} at the {len(tokens)} placeholders are not the {len(features)} features that its "
        "encoder gave, in the order of the prompt; allowed: classes that write features there as they are."
    )


def _alike(tokens: Tensor, features: Tensor) -> bool:
    alike = cosine_similarity(tokens, features, dim=-1) > _ALIKE
    # Nothing can be said of what is zero or overflowed.
    either = tokens.norm(dim=-1) * features.norm(dim=-1)
    return bool((alike | (either == 0) | ~either.isfinite()).all())
