"""The linear layers, norm and activation of a host's projector, found by what they are."""

from __future__ import annotations

from typing import Any

from torch import nn

from vlmprune.errors import UnsupportedMethodError
from vlmprune.methods.projector import ProjectorLayers


def projector_layers(projector: nn.Module, patches: int) -> ProjectorLayers:
    """Return the weights of a projector of two linear layers.

    Args:
        projector: the module.
        patches: patches that become one visual token.

    Raises:
        UnsupportedMethodError: it is built otherwise, or its weights are quantized or not in memory.
    """
    leaves = [module for module in projector.modules() if not any(module.children())]
    linears = [leaf for leaf in leaves if isinstance(leaf, nn.Linear)]
    norms = [leaf for leaf in leaves if type(leaf).__name__.endswith("Norm")]
    others = [leaf for leaf in leaves if leaf not in linears and leaf not in norms]
    if len(linears) != 2 or len(norms) > 1 or len(others) != 1 or any(True for _ in others[0].parameters()):
        raise UnsupportedMethodError(
            f"The projector {type(projector).__name__} has {len(linears)} linear layers and {len(norms)} norms; needed: two "
            "linear layers with an activation between them, and one norm before them or none."
        )
    first, second = linears
    for linear in linears:
        shape = (linear.out_features, linear.in_features)
        if linear.weight.shape != shape or not linear.weight.is_floating_point() or linear.weight.is_meta:
            raise UnsupportedMethodError(
                f"The weights of the projector {type(projector).__name__} are quantized or not in memory; "
                f"needed: floats {list(shape)}."
            )
    # Not the module itself: hooks of others are for the calls of the model.
    activation = others[0].forward
    if not norms:
        return ProjectorLayers(first.weight, first.bias, activation, second.weight, patches)
    (norm,) = norms
    epsilon: Any = getattr(norm, "eps", None) or getattr(norm, "variance_epsilon", 0.0)
    weight, bias = getattr(norm, "weight", None), getattr(norm, "bias", None)
    groups = first.in_features // weight.numel() if weight is not None else patches
    return ProjectorLayers(
        first.weight,
        first.bias,
        activation,
        second.weight,
        groups,
        "layer" if isinstance(norm, nn.LayerNorm) else "rms",
        weight,
        bias,
        float(epsilon),
    )
