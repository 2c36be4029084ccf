"""Published pruning and merging methods, one a file."""

from .base import Method
from .divprune import DivPrune
from .fastervlm import FasterVLM
from .pool import Pool
from .random import Random
from .uniform import Uniform

__all__ = ["DivPrune", "FasterVLM", "Method", "Pool", "Random", "Uniform"]
