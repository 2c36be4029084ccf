"""Mixture of experts: router logits in the columns of the caller, and a balancing loss on the tokens that were routed."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError

from .hooks import HookSet


class RouterLogits(tuple[Tensor, ...]):
    """The logits of every layer, `[batch * columns, experts]`, as the host gives them; rows of dropped tokens are zero.

    Attributes:
        routed: per layer bool `[batch * columns]`, true at the tokens that the layer routed, padding left out.
    """

    routed: tuple[Tensor, ...]


def restored_router_logits(
    logits: Iterable[Tensor], restored: Callable[[Tensor, int], Tensor], valid: Tensor
) -> RouterLogits:
    """Spread the router logits of a pruned call over the caller's columns.

    Args:
        logits: per layer `[batch * width, experts]`.
        restored: what spreads `[batch, width, dim]` of a layer over the caller's columns.
        valid: bool `[batch, columns]` on any device, false at padding.
    """
    spread, routed = [], []
    for layer, each in enumerate(logits):
        rows = each.view(len(valid), -1, each.shape[-1])
        whole = restored(rows, layer)
        alive = restored(torch.ones_like(rows[..., :1]), layer)[..., 0].bool()
        spread.append(whole.flatten(0, 1))
        routed.append((alive & valid.to(alive.device, non_blocking=True)).flatten())
    result = RouterLogits(spread)
    result.routed = tuple(routed)
    return result


def watch_balancing_loss(model: nn.Module, hooks: HookSet) -> None:
    """Correct the balancing loss of a mixture of experts; other models are left alone."""
    if _host_loss(model) is not None:
        hooks.after("balancing loss", model, _correct_loss)


def _correct_loss(module: Any, args: Any, kwargs: Any, output: Any) -> Any:
    """Make `aux_loss` anew from the tokens that were routed, and put the difference into `loss`.

    The host counts by the mask of the whole prompt.
    """
    if isinstance(output, tuple):
        if any(isinstance(item, RouterLogits) for item in output):
            raise UnsupportedCallError(
                "output_router_logits=True with return_dict=False in a pruned call; leave return_dict unset."
            )
        return None
    logits, before = getattr(output, "router_logits", None), getattr(output, "aux_loss", None)
    loss_of = _host_loss(module)
    if not isinstance(logits, RouterLogits) or before is None or loss_of is None:
        return None
    config: Any = module.config.get_text_config()
    kept = tuple(each[routed] for each, routed in zip(logits, logits.routed, strict=True))
    output.aux_loss = loss_of(kept, config.num_experts, config.num_experts_per_tok, None)
    if output.loss is not None:
        output.loss = output.loss + config.router_aux_loss_coef * (output.aux_loss - before).to(output.loss.device)
    return output


def _host_loss(model: nn.Module) -> Callable[..., Any] | None:
    for cls in type(model).__mro__:
        found: Callable[..., Any] | None = getattr(sys.modules.get(cls.__module__), "load_balancing_loss_func", None)
        if found is not None:
            return found
    return None
