"""Published pruning and merging methods, one a file."""

from .base import Method
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .fastv import FastV
from .globalcom2 import GlobalCom2
from .hired import HiRED
from .pool import Pool
from .pyramiddrop import PyramidDrop
from .random import Random
from .todre import ToDRE
from .todre_relevance import ToDRERelevance
from .uniform import Uniform
from .vtc_cls import VTCCLS

__all__ = [
    "VTCCLS",
    "DivPrune",
    "FastV",
    "FasterVLM",
    "GlobalCom2",
    "HiRED",
    "Method",
    "Pool",
    "PyramidDrop",
    "Random",
    "ToDRE",
    "ToDRERelevance",
    "Uniform",
]
