"""The calls in which the host encodes images and videos, watched for what the prefill must know of them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from vlmprune.errors import UnsupportedFamilyError
from vlmprune.methods.batch import VisionSignal

from ..calls import PIXELS, CallStack, TowerCall
from ..hooks import HookSet
from ..tracing import break_graph, check_not_exported
from .encoded_visuals import EncodedVisuals, LiveEncodings, encoded_visuals, set_encoded_visuals

if TYPE_CHECKING:
    from ..families.family import Family


class EncoderCall:
    """Stands in for `get_image_features` or `get_video_features` on one model.

    `generate` calls them by name, not through `forward`, so hooks on modules do not see their arguments (sizes of
    images, grids).
    """

    def __init__(
        self,
        encode: Callable[..., Any],
        modality: str,
        family: Family,
        signals: Sequence[VisionSignal],
        calls: CallStack,
        live: LiveEncodings,
        hooks: HookSet,
        check_inputs: Callable[[Mapping[str, Any]], None] | None = None,
    ) -> None:
        self.encode = encode
        self.check_inputs = check_inputs
        self.modality = modality
        self.family = family
        self.signals = tuple(signals)
        self.calls = calls
        self.live = live
        self.hooks = hooks
        self.__signature__ = inspect.signature(encode)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Encode as the host does, and attach `EncodedVisuals` to the output."""
        check_not_exported()
        break_graph()
        inputs = {**self.__signature__.bind_partial(*args, **kwargs).arguments, **kwargs}
        self.family.check_encoding(self.modality, inputs)
        if self.check_inputs is not None:
            self.check_inputs(inputs)
        self.hooks.check_in_place()
        call = TowerCall(modality=self.modality)
        # Some hosts encode videos by the call for images.
        nested = bool(self.calls.tower)
        self.calls.tower.append(call)
        try:
            output = self.encode(*args, **kwargs)
        finally:
            self.calls.tower.pop()
        features = getattr(output, "pooler_output", None)
        if features is None and self.family.is_general:
            raise UnsupportedFamilyError(
                f"get_{self.modality}_features of {type(self.family.multimodal_model).__name__} returned no `pooler_output`, in "
                "which other classes have the features of each image as they enter the language model."
            )
        if features is None:
            return output
        items = self.family.feature_items(self.modality, features)
        inner = encoded_visuals(output)
        tower = None if call.reduction is None else call.reduction.tower_tokens()
        if inner is not None:
            tower = inner.tower
        visuals = EncodedVisuals(
            modality=self.modality,
            inputs={name: value for name, value in inputs.items() if name not in PIXELS.values()},
            counts=self.family.token_counts(self.modality, items),
            vision=inner.vision
            if inner
            else {signal: self.family.tower_reader.read(signal, call) for signal in self.signals},
            features=items if isinstance(items, Tensor) else tuple(items),
            tower=tower,
        )
        set_encoded_visuals(output, visuals)
        self.live.add(visuals)
        if self.calls.model and not nested:
            self.calls.model[-1].encoded[self.modality] = output
        return output


def watch_encoders(
    family: Family,
    signals: Sequence[VisionSignal],
    calls: CallStack,
    live: LiveEncodings,
    hooks: HookSet,
    check_inputs: Callable[[Mapping[str, Any]], None] | None = None,
) -> None:
    """Watch the encoding of every modality of the family, and the tower layers that `signals` name.

    Args:
        family: the model's adapter.
        signals: what is read of the tower.
        calls: the running calls.
        live: where encodings are noted.
        hooks: where the hooks are registered.
        check_inputs: refuses arguments of a call, by name, or lets them pass.
    """
    if signals:
        family.check_tower()
        family.tower_reader.install(family, signals, calls, hooks)
    model: nn.Module = family.multimodal_model
    for modality in family.modalities:
        name = f"get_{modality}_features"
        call = EncoderCall(getattr(model, name), modality, family, signals, calls, live, hooks, check_inputs)
        hooks.replace(f"{modality} encoder", model, name, call)
