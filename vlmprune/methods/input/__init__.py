"""Methods that select or merge visual tokens before the language model, one line each, in the order of tables."""

# ruff: noqa: I001
from .fastervlm import FasterVLM as FasterVLM
from .vtc_cls import VTCCLS as VTCCLS
from .hired import HiRED as HiRED
from .globalcom2 import GlobalCom2 as GlobalCom2
from .divprune import DivPrune as DivPrune
from .todre import ToDRE as ToDRE
from .hiprune import HiPrune as HiPrune
from .holov import HoloV as HoloV
from .textmonkey import TextMonkey as TextMonkey
from .vispruner import VisPruner as VisPruner
from .visiondrop import VisionDrop as VisionDrop
from .visionzip import VisionZip as VisionZip
from .scope import SCOPE as SCOPE
from .zooprune import ZOOPrune as ZOOPrune
from .cdpruner import CDPruner as CDPruner
from .mmtok import MMTok as MMTok
from .tokencorr import TokenCorr as TokenCorr
from .recoverable_compression import RecoverableCompression as RecoverableCompression
from .hawk import HAWK as HAWK
from .aim import AIM as AIM
from .catp import CATP as CATP
from .pixelprune import PixelPrune as PixelPrune
