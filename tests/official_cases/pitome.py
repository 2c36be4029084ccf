"""Cases of PiToMe's merges, and its schedule for LLaVA."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from official_cases.batches import CLIP
from official_cases.input_site import Tensors
from vlmprune.methods.encoder.pitome import PiToMe
from vlmprune.methods.encoder.pitome_energy import energy_match, merged_away
from vlmprune.methods.encoder_method import BlockBatch


def pitome_merge(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One merge by any variant."""
    metric, variant, class_token = inputs["metric"], params["variant"], params["class_token"]
    batch, tokens, _ = metric.shape
    r = merged_away(tokens, params["ratio"], variant, class_token)
    match = energy_match(
        metric, r, params["margin"], variant=variant, class_token=class_token, alpha=params.get("alpha", 1.0)
    )
    # Block 0 has the whole margin.
    method = PiToMe(ratio=params["ratio"], margin=params["margin"], alpha=params.get("alpha", 1.0), schedule=variant)
    leading = int(class_token)
    sizes = inputs["size_in"][..., 0] if "size_in" in inputs else torch.ones(batch, tokens)
    by_size = replace(method, weights="size")
    x = inputs["x"]
    # What is compared is not what is merged here, so the metric is read as keys of one head.
    block = BlockBatch(0, x, r, CLIP, sizes=sizes, leading=leading, key=metric[:, :, None])
    plain, averaged = (replace(some, metric="keys").reduce(block) for some in (method, by_size))
    assert averaged.sizes is not None
    results = {
        "x_out_mean": plain.values,
        "x_out_wavg": averaged.values,
        "size_out": averaged.sizes[..., None],
        "dst_idx": match.partners,
        "src_idx": match.sources,
        "unm_idx": match.unmerged,
        "a_idx": match.a,
        "b_idx": match.b,
        "protected_idx": match.protected,
    }
    return results if match.energy is None else {**results, "energy": match.energy}


def pitome_counts(params: Mapping[str, Any]) -> dict[str, Tensor]:
    """Tokens that enter every layer, and leave the last, at the ratios that the paper's tables use and those between."""
    first, last = (int(layer) for layer in params["bsm_layers"].split(".."))
    results = {}
    for ratio in (thousandths / 1000 for thousandths in range(500, 1001, 25)):
        counts = [params["T0"]]
        for layer in range(params["layers"]):
            variant = "bsm" if first <= layer <= last else "pitome"
            counts.append(counts[-1] - merged_away(counts[-1], ratio, variant, class_token=True))
        results[f"ratio_{ratio}".replace(".", "p")] = torch.tensor(counts)
    return results


def pitome(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """A merge, or the schedule."""
    return pitome_merge(params, inputs) if "variant" in params else pitome_counts(params)


RUNS = {"pitome": pitome}
