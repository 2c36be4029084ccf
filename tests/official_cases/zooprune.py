"""Cases of ZOO-Prune: one image, by the projector's input and weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor
from torch.nn.functional import gelu, linear

from official_cases.batches import make_batch, square_layout
from official_cases.input_site import Tensors
from vlmprune.methods.input.zooprune import ZOOPrune, zooprune_order
from vlmprune.methods.input.zooprune_sensitivity import sensitivity
from vlmprune.methods.projector import ProjectorLayers
from vlmprune.methods.shared.patches import select_patches


def zooprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """Sensitivity along the given directions, and the picks."""
    x, first_bias, second_bias = (inputs[name] for name in ("x", "b1", "b2"))
    projector = ProjectorLayers(inputs["w1"], first_bias, gelu, inputs["w2"])
    projected = linear(gelu(linear(x, inputs["w1"], first_bias)), inputs["w2"], second_bias)
    scores = sensitivity(x, projector, inputs["u"], params["h"])
    method = ZOOPrune(keep=params["K"], m=params["m"], h=params["h"], sketch=None)
    batch = make_batch(method, [square_layout(len(x))], features=projected)
    order = zooprune_order(batch, scores)
    return {
        "sensitivity": scores,
        "z": projected,
        "order": order,
        "indices_sorted": select_patches(order, batch).kept,
    }


RUNS = {"zooprune": zooprune}
