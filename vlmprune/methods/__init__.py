"""Published pruning and merging methods: a folder a site, one method a file.

Each folder's `__init__` names its methods; all of them are reachable from here, as `vlmprune.methods.FastV`.
"""

from typing import TYPE_CHECKING

from . import attention, baselines, encoder, input, layer, video
from .attention_method import AttentionMethod as AttentionMethod
from .base import Method as Method
from .encoder_method import EncoderMethod as EncoderMethod
from .input_method import InputMethod as InputMethod
from .layer_method import LayerMethod as LayerMethod
from .picture_method import FrameOrVideoMethod as FrameOrVideoMethod
from .picture_method import PictureMethod as PictureMethod
from .registry import register as register

if TYPE_CHECKING:
    from .attention import *  # noqa: F403
    from .baselines import *  # noqa: F403
    from .encoder import *  # noqa: F403
    from .input import *  # noqa: F403
    from .layer import *  # noqa: F403
    from .video import *  # noqa: F403

_classes = {
    cls.__name__: cls
    for folder in (baselines, encoder, input, video, layer, attention)
    for cls in vars(folder).values()
    if isinstance(cls, type) and issubclass(cls, Method)
}
globals().update(_classes)
__all__ = sorted(
    [
        *_classes,
        "AttentionMethod",
        "EncoderMethod",
        "InputMethod",
        "LayerMethod",
        "Method",
        "FrameOrVideoMethod",
        "PictureMethod",
        "register",
    ]
)
