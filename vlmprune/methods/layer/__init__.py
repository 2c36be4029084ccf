"""Methods that drop visual tokens between the layers of the language model."""

from .fastv import FastV
from .pyramiddrop import PyramidDrop
from .todre_relevance import ToDRERelevance

METHODS = (FastV, PyramidDrop)

__all__ = ["FastV", "PyramidDrop", "ToDRERelevance"]
