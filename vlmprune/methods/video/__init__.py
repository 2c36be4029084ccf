"""Methods that look at the frames of videos, one line each, in the order of tables."""

from .evs import EVS as EVS
from .fastvid import FastVID as FastVID
from .flashvid import FlashVID as FlashVID
from .holitom import HoliTom as HoliTom
from .vidcom2 import VidCom2 as VidCom2
