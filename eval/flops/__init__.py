"""Analytic cost of one request of a vision-language model, from the token counts that each layer really saw.

Counts are multiply-accumulates (MACs) of matrix products, convolutions and attention products; FLOPs are twice that.
Attention is counted in full (not halved for causality), as fused kernels and
`torch.utils.flop_counter.FlopCounterMode` count it. Norms, activations, softmax, rotary embeddings, resizing and pooling are
not counted.
"""

from .families import VisionCost, vision_cost
from .formulas import equivalent_tokens, fastv_formula, pyramiddrop_formula
from .language import LanguageShape
from .request_cost import STAGES, Cost, request_cost
from .selection import selection_macs
from .vision_work import VisionWork

__all__ = [
    "STAGES",
    "Cost",
    "LanguageShape",
    "VisionCost",
    "VisionWork",
    "equivalent_tokens",
    "fastv_formula",
    "pyramiddrop_formula",
    "request_cost",
    "selection_macs",
    "vision_cost",
]
