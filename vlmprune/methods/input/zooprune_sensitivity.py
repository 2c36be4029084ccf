"""How much the projector's output changes with its input, along random directions."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from torch.nn.functional import linear

from vlmprune.methods.projector import ProjectorLayers

# Elements of the largest intermediate, tokens (or rows of the second layer) times directions times hidden width, that are
# held at once.
CHUNK_ELEMENTS = 2**22


def sensitivity(
    features: Tensor, projector: ProjectorLayers, directions: Tensor, h: float, sketch: Tensor | None = None
) -> Tensor:
    """Return the mean over the directions of the length of `(M(x + h u) - M(x - h u)) / 2h`, fp32 `[tokens]`.

    The first linear layer sees features and directions once each, not every pair; norms before it are followed exactly.

    Args:
        features: `[tokens, patches * dim]`, the projector's input.
        projector: M.
        directions: u, `[directions, dim]`; every patch of a token is moved along the same one.
        h: step; 0 for the limit of small steps.
        sketch: `[sets, rows, out]` random rows that the second layer's output is multiplied with before its length is taken;
            direction j takes set `j % sets`.
    """
    second = projector.second.float()[None]
    if sketch is not None:
        second = (sketch.flatten(0, 1) @ second[0]).unflatten(0, sketch.shape[:2])
    if h == 0 and projector.norm is None and second.shape[1] < len(features):
        return _lengths_by_direction(features, projector, directions, second)
    lengths = []
    for change in _hidden_changes(features.float(), projector, directions, h):
        parts = [(change[:, turn :: len(second)] @ rows.T).norm(dim=-1) for turn, rows in enumerate(second)]
        lengths.append(torch.cat(parts, 1).mean(-1))
    return torch.cat(lengths) if lengths else features.new_zeros(0, dtype=torch.float32)


def _lengths_by_direction(features: Tensor, projector: ProjectorLayers, directions: Tensor, second: Tensor) -> Tensor:
    """Return what `sensitivity` does for `h=0` and no norm, as products of tokens with the second layer along each direction.

    The second layer has fewer rows than there are tokens: scaling them by a direction's slopes, not every token's change,
    leaves matrix products and little else. Where the activation stands on its curve is what the projector itself computes,
    in its dtype.
    """
    columns, _ = _first_layer(projector)
    base = linear(features.to(projector.first.dtype), projector.first, projector.first_bias).float()
    derivative, slopes = _derivative(projector, base), directions.float() @ columns.sum(1).T
    total = base.new_zeros(len(features))
    for turn, rows in enumerate(second):
        for some in slopes[turn :: len(second)].split(max(1, CHUNK_ELEMENTS // rows.numel())):
            along = (some[:, None] * rows).flatten(0, 1)
            total += (derivative @ along.T).view(len(features), len(some), -1).norm(dim=-1).sum(-1)
    return total / len(slopes)


def _first_layer(projector: ProjectorLayers) -> tuple[Tensor, Tensor]:
    """Return the first layer's weight as `[hidden, patches, dim]`, each patch of a token with its own columns, and its bias."""
    first = projector.first.float()
    bias = first.new_zeros(len(first)) if projector.first_bias is None else projector.first_bias.float()
    return first.view(len(first), projector.patches, -1), bias


def _hidden_changes(features: Tensor, projector: ProjectorLayers, directions: Tensor, h: float) -> Iterator[Tensor]:
    """Yield, for some tokens at a time, the change behind the activation per step: `[tokens, directions, hidden]`."""
    patches = projector.patches
    columns, bias = _first_layer(projector)
    hidden = len(bias)
    rows, moves = features.unflatten(1, (patches, -1)), directions.float()
    if projector.norm == "layer":
        rows, moves = rows - rows.mean(-1, keepdim=True), moves - moves.mean(-1, keepdim=True)
    if projector.norm_bias is not None:
        bias = bias + columns.sum(1) @ projector.norm_bias.float()
    if projector.norm_weight is not None:
        columns = columns * projector.norm_weight.float()
    of_moves = torch.einsum("jd,hpd->jph", moves, columns)
    step = max(1, CHUNK_ELEMENTS // max(1, len(moves) * hidden * (patches if projector.norm else 1)))
    for some in rows.split(step):
        of_rows = torch.einsum("npd,hpd->nph", some, columns)
        if projector.norm is None:
            base, slope = of_rows.sum(1) + bias, of_moves.sum(1)
            if h == 0:
                yield _derivative(projector, base)[:, None] * slope
            else:
                up, down = (projector.activation(base[:, None] + t * slope) for t in (h, -h))
                yield (up - down) / (2 * h)
            continue
        dim = some.shape[-1]
        square, product = some.square().mean(-1), some @ moves.T / dim
        if h == 0:
            scale = (square + projector.epsilon).rsqrt()
            base = (of_rows * scale[..., None]).sum(1) + bias
            slope = torch.einsum("np,jph->njh", scale, of_moves)
            slope = slope - torch.einsum("npj,nph->njh", product * scale[..., None] ** 3, of_rows)
            yield _derivative(projector, base)[:, None] * slope
            continue
        ends = []
        for t in (h, -h):
            # [tokens, patches, directions]: the norm's divisor at x + t u.
            scale = (square[..., None] + 2 * t * product + t * t * moves.square().mean(-1) + projector.epsilon).rsqrt()
            moved = torch.einsum("npj,nph->njh", scale, of_rows) + t * torch.einsum("npj,jph->njh", scale, of_moves)
            ends.append(projector.activation(moved + bias))
        yield (ends[0] - ends[1]) / (2 * h)


def _derivative(projector: ProjectorLayers, values: Tensor) -> Tensor:
    """Return the activation's derivative at `values`, fp32."""
    # Reverse mode: the levels of forward mode belong to the process, and other threads may prefill at the same time.
    with torch.inference_mode(False), torch.enable_grad():
        at = values.detach().clone().requires_grad_()
        (derivative,) = torch.autograd.grad(projector.activation(at).sum(), at)
    return derivative
