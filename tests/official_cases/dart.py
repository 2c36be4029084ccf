"""Cases of DART: normed hidden states and keys of one prompt, and the order in which the official pivots chose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods import DART
from vlmprune.methods.layer_method import LayerBatch, ProbedLayer, TextSpans


@dataclass(frozen=True, kw_only=True)
class OrderedDART(DART):
    """DART whose pivots choose in a given order of columns, as CPython's sets order them."""

    order: tuple[int, ...] = ()

    def order_pivots(self, image: Tensor, text: Tensor) -> Sequence[int]:
        columns = torch.cat([image, text]).tolist()
        return [columns.index(column) for column in self.order]


def dart(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One cut; `pivot_order` stands among the inputs where the order is not ours to find."""
    total, start, length = params["N"], params["image_start"], params["S"]
    method = OrderedDART(
        layer=1,
        keep=1,
        image_pivots=params["pivot_image"],
        text_pivots=params["pivot_text"],
        order=tuple(inputs["pivot_order"].tolist()) if "pivot_order" in inputs else (),
    )
    before, columns, after = torch.arange(length).split([start, total, length - start - total])
    batch = LayerBatch(
        layer=1,
        counts=(total,),
        budgets=(params["kept"],),
        rows=(0,),
        columns=(columns,),
        text=(TextSpans(before, after, after),),
        hidden=inputs["hidden"],
        probed=ProbedLayer(query=None, key=inputs["keys"].transpose(1, 2), kinds=None, scale=1.0),
        final_norm=lambda hidden: hidden,
    )
    if not method.order:
        method = OrderedDART(**{**vars(method), "order": set_order(method, batch)})
    (claims,) = method.claims(batch)
    retained = start + method.select_at_layer(batch).kept
    pivots = torch.cat([columns[claims.image_pivots], after[claims.text_pivots]]).tolist()
    return {
        "pivot_image": columns[claims.image_pivots],
        "pivot_text": after[claims.text_pivots],
        "pivot_order": torch.tensor(method.order),
        "claimed": torch.stack([start + claims.claimed[pivots.index(column)] for column in method.order]),
        "retained": retained,
        "keep_positions": torch.cat([before, retained, after]),
    }


def set_order(method: DART, batch: LayerBatch) -> tuple[int, ...]:
    """Return the columns of the pivots in the order in which a Python set of them is gone through."""
    norms = batch.probed.key[0].float().abs().sum((1, 2))  # type: ignore[union-attr]
    found: list[int] = []
    for places, count in ((batch.columns[0], method.image_pivots), (batch.text[0].after, method.text_pivots)):
        found += places[norms[places].topk(count).indices].tolist()
    return tuple(set(found))


RUNS = {"dart": dart}
