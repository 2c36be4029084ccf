"""Methods that drop visual tokens between the layers of the language model, one line each, in the order of tables."""

from .aim_pagerank import AIMPageRank as AIMPageRank
from .catp_stages import CATPStages as CATPStages
from .dart import DART as DART
from .fastv import FastV as FastV
from .ivcprune import IVCPrune as IVCPrune
from .mustdrop_filter import MustDropFilter as MustDropFilter
from .pyramiddrop import PyramidDrop as PyramidDrop
from .sink import Sink as Sink
from .sparsevlm import SparseVLM as SparseVLM
from .todre_relevance import ToDRERelevance as ToDRERelevance
from .transprune import TransPrune as TransPrune
from .visiondrop_stages import VisionDropStages as VisionDropStages
