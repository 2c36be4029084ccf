"""Cases of TokenCorrCompressor: one crop, with the random draws given."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from official_cases.batches import CLIP, make_batch, square_layout
from official_cases.input_site import Tensors
from vlmprune.methods.input.tokencorr import TokenCorr


class GivenNoise(TokenCorr):
    """The method with the draws of a case."""

    draws: Tensor

    def noise(self, count: int) -> Tensor:
        return self.draws


def tokencorr(params: Mapping[str, Any], inputs: Tensors) -> dict[str, Tensor]:
    """What is redundant, drawn and singled out, and what is kept."""
    names = ("sim_threshold", "min_count", "iqr_factor")
    method = GivenNoise(**{name: params[name] for name in names})
    object.__setattr__(method, "draws", inputs["noise"])
    keys, low, deep = (inputs[name] for name in ("keys_low", "p_low", "a_deep"))
    vision = dict(zip(method.vision_signals(CLIP), (keys, low[:, None], deep[:, None]), strict=True))
    batch = make_batch(method, [square_layout(len(keys))], features=keys, vision=vision)
    chosen = method.crop(keys, low, deep, inputs["noise"])
    return {
        "redundant": chosen.redundant,
        "local_idx": chosen.local,
        "global_idx": chosen.outlier.nonzero().flatten(),
        "kept": method.select(batch).kept,
    }


RUNS = {"tokencorr": tokencorr}
