"""Methods that reduce tokens inside the vision tower, one line each, in the order of tables."""

# ruff: noqa: I001
from .tome import ToMe as ToMe
from .expedite import Expedite as Expedite
from .pitome import PiToMe as PiToMe
from .crossget import CrossGET as CrossGET
from .mctf import MCTF as MCTF
from .zero_tprune import ZeroTPrune as ZeroTPrune
from .token_transforming import TokenTransforming as TokenTransforming
from .mustdrop import MustDrop as MustDrop
