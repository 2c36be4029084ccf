"""PiToMe's match: tokens in crowds merge, those that stand alone are protected."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.nn.functional import elu, normalize

Variant = Literal["pitome", "bsm_pitome", "bsm", "text"]
VARIANTS: tuple[Variant, ...] = ("pitome", "bsm_pitome", "bsm", "text")


@dataclass(frozen=True)
class EnergyMatch:
    """Which tokens merge into which, all int64; positions leave the class token out, except in the variant "bsm".

    Attributes:
        a: `[batch, sources]` the set that tokens are merged from.
        b: `[batch, destinations]` the set that they are merged into.
        sources: `[batch, r]` rows of `a` that are merged, best first.
        partners: `[batch, r]` the row of `b` that each of them goes to.
        unmerged: `[batch, rest]` rows of `a` that stay.
        protected: `[batch, protected]` positions that take no part.
        energy: fp32 `[batch, tokens]`; None for "bsm".
    """

    a: Tensor
    b: Tensor
    sources: Tensor
    partners: Tensor
    unmerged: Tensor
    protected: Tensor
    energy: Tensor | None = None


def merged_away(tokens: int, ratio: float, variant: Variant, class_token: bool) -> int:
    """Return how many tokens one merge at `ratio` takes away, in the official codes' floating point."""
    if ratio >= 1.0:
        return 0
    counted = tokens if variant == "bsm" else tokens - class_token
    return min(math.floor(counted - counted * ratio), (tokens - class_token) // 2)


def energies(cosines: Tensor, margin: float, alpha: float = 1.0) -> Tensor:
    """Return how crowded each token is, `[batch, tokens]`: the mean of `ELU(cosine - margin)` over all tokens."""
    return elu(cosines - margin, alpha=alpha).mean(-1)


def gaussian_energies(cosines: Tensor, margin: float) -> Tensor:
    """Return the energy of the text variant: the mean of a Gaussian of `1 - cosine` with width `1 - margin`."""
    sigma = 1.0 - margin
    return ((((1.0 - cosines) / sigma).square() * -0.5).exp() / (sigma * math.sqrt(2.0 * math.pi))).mean(-1)


def energy_match(
    metric: Tensor, r: int, margin: float, *, variant: Variant = "pitome", class_token: bool = True, alpha: float = 1.0
) -> EnergyMatch:
    """Match the tokens of every sequence in a batch; equal energies and equal cosines go to the lowest index.

    Args:
        metric: `[batch, tokens, dim]`, class token first where there is one.
        r: how many tokens are merged away.
        margin: cosine above which two tokens are of one crowd.
        variant: "pitome"; "bsm_pitome": even and odd ranks of all energies, of which the best r pairs merge; "bsm": even
            and odd positions, as in ToMe; "text": the r highest energies into the next r.
        class_token: whether row 0 is one, which never merges.
        alpha: how deep the energy falls below the margin.
    """
    if variant == "bsm":
        return _parity_match(metric, r, class_token)
    rows = normalize(metric.float()[:, int(class_token) :], dim=-1)
    cosines = rows @ rows.transpose(1, 2)
    energy = gaussian_energies(cosines, margin) if variant == "text" else energies(cosines, margin, alpha)
    order = energy.sort(dim=-1, descending=True, stable=True).indices
    if variant == "text":
        a, b, protected = order[:, :r], order[:, r : 2 * r], order[:, 2 * r :]
    else:
        taken = order if variant == "bsm_pitome" else order[:, : 2 * r]
        a, b, protected = taken[:, ::2], taken[:, 1::2], order[:, taken.shape[1] :]
    best, partners = _best_partners(rows, a, b)
    if variant != "bsm_pitome":
        every = torch.arange(a.shape[1], device=a.device).expand_as(a)
        return EnergyMatch(a, b, every, partners, every[:, :0], protected, energy)
    return EnergyMatch(a, b, *_top_pairs(best, partners, r), protected, energy)


def _parity_match(metric: Tensor, r: int, class_token: bool) -> EnergyMatch:
    rows = normalize(metric.float(), dim=-1)
    positions = torch.arange(rows.shape[1], device=rows.device).expand(rows.shape[:2])
    a, b = positions[:, ::2], positions[:, 1::2]
    best, partners = _best_partners(rows, a, b)
    if class_token:
        best[:, 0] = -torch.inf
    sources, partners, unmerged = _top_pairs(best, partners, r)
    if class_token:
        unmerged = unmerged.sort(-1).values
    return EnergyMatch(a, b, sources, partners, unmerged, positions[:, :0])


def _best_partners(rows: Tensor, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    if b.shape[1] == 0:
        return rows.new_empty(a.shape), torch.zeros_like(a)
    sources, destinations = (rows.gather(1, some[..., None].expand(-1, -1, rows.shape[2])) for some in (a, b))
    return tuple((sources @ destinations.transpose(1, 2)).max(-1))  # type: ignore[return-value]


def _top_pairs(best: Tensor, partners: Tensor, r: int) -> tuple[Tensor, Tensor, Tensor]:
    order = best.sort(dim=-1, descending=True, stable=True).indices
    sources, unmerged = order[:, :r], order[:, r:]
    return sources, partners.gather(1, sources), unmerged


def energy_groups(match: EnergyMatch, class_token: bool) -> tuple[Tensor, Tensor]:
    """Return the groups of a match in the official order: class token, protected, unmerged, then set b.

    Returns:
        The output row of every token, int64 `[batch, tokens]`, and the token that each output row is the place of,
        int64 `[batch, outputs]`; both count the class token.
    """
    shift = int(class_token and match.energy is not None)
    stay = [match.protected, match.a.gather(1, match.unmerged), match.b]
    places = torch.cat([match.b.new_zeros(len(match.b), shift), *(some + shift for some in stay)], 1)
    tokens = places.shape[1] + match.sources.shape[1]
    groups = places.new_empty(len(places), tokens)
    rows = torch.arange(places.shape[1], device=places.device).expand_as(places)
    groups.scatter_(1, places, rows)
    first = places.shape[1] - match.b.shape[1]
    groups.scatter_(1, match.a.gather(1, match.sources) + shift, match.partners + first)
    return groups, places
