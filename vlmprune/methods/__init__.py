"""Published pruning and merging methods: a folder a site, one method a file."""

from .base import Method
from .baselines import Pool, Random, Uniform
from .input import VTCCLS, DivPrune, FasterVLM, GlobalCom2, HiPrune, HiRED, ToDRE
from .layer import FastV, PyramidDrop, ToDRERelevance

__all__ = [
    "VTCCLS",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "GlobalCom2",
    "HiPrune",
    "HiRED",
    "Method",
    "Pool",
    "PyramidDrop",
    "Random",
    "ToDRE",
    "ToDRERelevance",
    "Uniform",
]
