"""Cases of IVC-Prune: values and rotary tables of one row, fed to the function that the method runs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from official_cases.input_site import Tensors
from vlmprune.methods.layer.ivcprune import IVCPrune
from vlmprune.methods.layer.ivcprune_image import choose
from vlmprune.methods.shared.rotary_coordinates import rotary_tables, table_means


def ivcprune(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """One image; tables are given, or position ids of which they are made."""
    values, start, total = inputs["values"].transpose(0, 1), params["start"], params["n"]
    width, llava = len(values), params["variant"].startswith("llava")
    image = torch.arange(start, start + total)
    if "cos" in inputs:
        tables = [inputs[name].view(-1, width, values.shape[-1])[:, image] for name in ("cos", "sin")]
    else:
        head_dim = values.shape[-1]
        frequencies = 1.0 / params["rope_theta"] ** (torch.arange(0, head_dim, 2).float() / head_dim)
        positions = inputs["position_ids"].view(-1, width) if "position_ids" in inputs else torch.arange(width)[None]
        tables = list(rotary_tables(positions[:, image], frequencies))
    cosines, sines = (table_means(table) for table in tables)
    method = IVCPrune(share=0.2, variant="llava-1.5") if llava else IVCPrune(share=0.5)
    text = torch.arange(start + total + 2, width)
    choice = choose(values, image, text, cosines, sines, method.counts(total), all_keys=llava)
    before, after = torch.arange(start), torch.arange(start + total, width)
    return {
        "cos_mean": cosines,
        "sin_mean": sines,
        "text_scores": choice.text_scores,
        "seeds": choice.seeds,
        "final_scores": choice.scores,
        "ivc": choice.coordinates.nonzero().flatten(),
        "value_top": choice.best,
        "keep_image": choice.kept,
        "keep_all": torch.cat([before, image[choice.kept], after]),
    }


RUNS = {"ivcprune": ivcprune}
