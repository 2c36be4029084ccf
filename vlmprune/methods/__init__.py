"""Published pruning and merging methods: a folder a site, one method a file."""

from .base import Method
from .baselines import Pool, Random, Uniform
from .input import VTCCLS, DivPrune, FasterVLM, GlobalCom2, HiPrune, HiRED, HoloV, TextMonkey, ToDRE, VisPruner
from .layer import FastV, PyramidDrop, ToDRERelevance

__all__ = [
    "VTCCLS",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "GlobalCom2",
    "HiPrune",
    "HiRED",
    "HoloV",
    "Method",
    "Pool",
    "PyramidDrop",
    "Random",
    "TextMonkey",
    "ToDRE",
    "ToDRERelevance",
    "Uniform",
    "VisPruner",
]
