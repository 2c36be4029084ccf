"""Baselines that every published method must beat."""

from .pool import Pool
from .random import Random
from .uniform import Uniform

METHODS = (Random, Uniform, Pool)

__all__ = ["Pool", "Random", "Uniform"]
