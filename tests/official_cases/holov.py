"""Cases of HoloV: one image, by features and attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import make_batch, square_layout
from official_cases.input_site import CLS_ATTENTION, Tensors
from vlmprune.methods.input.holov import HoloV


def holov(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """The images of a case as one batch, with the official counts and order."""
    features, attention = inputs["features"], inputs["attention"]
    images, tokens = attention.shape
    method = HoloV(keep=params["K"], num_patches=params["num_patches"], beta=params["beta"], faithful=True)
    batch = make_batch(
        method,
        [square_layout(tokens)] * images,
        features=features.flatten(0, 1),
        vision={CLS_ATTENTION: attention.flatten()[:, None]},
    )
    scores = method.run_scores(batch)
    selection = method.select(batch)
    assert selection.features is not None
    return {
        "allocated": method.quotas(scores, batch),
        "patch_scores": scores.runs.by_image(scores.weights),
        "positions": torch.stack(method.official_order(scores, batch)),
        "tokens": selection.features.view(images, params["K"], -1),
    }


RUNS = {"holov": holov}
