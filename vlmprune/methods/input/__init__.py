"""Methods that select or merge visual tokens before the first layer of the language model."""

from .divprune import DivPrune
from .fastervlm import FasterVLM
from .globalcom2 import GlobalCom2
from .hiprune import HiPrune
from .hired import HiRED
from .holov import HoloV
from .textmonkey import TextMonkey
from .todre import ToDRE
from .vispruner import VisPruner
from .vtc_cls import VTCCLS

METHODS = (FasterVLM, VTCCLS, HiRED, GlobalCom2, DivPrune, ToDRE, HiPrune, HoloV, TextMonkey, VisPruner)

__all__ = [
    "VTCCLS",
    "DivPrune",
    "FasterVLM",
    "GlobalCom2",
    "HiPrune",
    "HiRED",
    "HoloV",
    "TextMonkey",
    "ToDRE",
    "VisPruner",
]
