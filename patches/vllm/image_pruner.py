"""Choosing the visual tokens of images that vLLM has encoded, by the same methods as in transformers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from vlmprune.errors import LayoutError, UnsupportedMethodError
from vlmprune.layout import VisualLayout
from vlmprune.methods.batch import VisualBatch
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.shared.position_tokens import choose_input

from ..calls import CallStack, TowerCall
from ..hooks import HookSet
from ..prefill.visuals import ShownVisuals, read_signals
from ..tower.encoded_visuals import EncodedVisuals
from .facts import VllmFamily
from .ranks import same_on_all_ranks


@dataclass(frozen=True, eq=False)
class PrunedImage:
    """What is left of one image.

    Attributes:
        features: `[kept, channels]` of what the vision tower gave.
        kept: int64 `[kept]`, which of its visual tokens these are, or stand in the places of, ascending.
        layout: the geometry of all of them.
    """

    features: Tensor
    kept: Tensor
    layout: VisualLayout


class ImagePruner:
    """A method on one model of vLLM.

    Attributes:
        family: the facts of the model.
        method: what selects.
        width: channels of a visual token that enter the language model; others go with it (DeepStack).
        last: the images of the latest call of the vision tower.
    """

    def __init__(self, model: nn.Module, family: type[VllmFamily], method: InputMethod, width: int) -> None:
        self.family = family(model)
        self.method = method
        self.width = width
        self.last: list[PrunedImage] = []
        self.calls = CallStack()
        self.hooks = HookSet()
        self.signals = method.vision_signals(self.family.tower_facts) if self.drops else ()
        if self.signals:
            self._check_layers()
            self.family.tower_reader.install(self.family, self.signals, self.calls, self.hooks)

    @property
    def drops(self) -> bool:
        """Whether the method drops anything at all."""
        return self.method.keep != 1.0 or isinstance(self.method.keep, int)

    @contextmanager
    def encoding(self) -> Iterator[TowerCall]:
        """Keep what the method reads of the vision tower while the body runs it."""
        call = TowerCall()
        self.calls.tower.append(call)
        try:
            yield call
        finally:
            self.calls.tower.pop()

    def prune(self, encoded: Sequence[Tensor], inputs: Mapping[str, Any], call: TowerCall) -> list[PrunedImage]:
        """Return what is left of each image.

        Args:
            encoded: `[tokens, channels]` of each image.
            inputs: what transformers' encoder takes beside the pixels (`image_grid_thw`, `image_sizes`).
            call: what was kept of the vision tower.

        Raises:
            LayoutError: the method kept another number of tokens than the prompt has places for.
        """
        visuals = EncodedVisuals("image", inputs, tuple(map(len, encoded)), {})
        layouts = visuals.layouts(self.family)
        budgets = tuple(map(self.method.budget, visuals.counts))
        if budgets == visuals.counts:
            whole = [
                torch.arange(count, device=item.device) for count, item in zip(visuals.counts, encoded, strict=True)
            ]
            self.last = [PrunedImage(*image) for image in zip(encoded, whole, layouts, strict=True)]
            return self.last
        for signal in self.signals:
            visuals.vision[signal] = self.family.tower_reader.read(signal, call)
        everything = torch.cat(list(encoded))
        with torch.no_grad():
            selection = choose_input(self.method, self._batch(everything[:, : self.width], visuals, budgets))
        expected = tuple(
            self.method.kept_count(count, layout.grid) for count, layout in zip(visuals.counts, layouts, strict=True)
        )
        if selection.counts != expected:
            raise LayoutError(
                f"{self.method.name!r} kept {list(selection.counts)} of {list(visuals.counts)} tokens, the prompt has places "
                f"for {list(expected)}."
            )
        local = same_on_all_ranks(selection.kept.to(everything.device))
        starts = torch.tensor(visuals.offsets[:-1]).repeat_interleave(torch.tensor(selection.counts))
        kept = everything[local + starts.to(local.device)]
        if selection.features is not None:
            deep = everything[:, self.width :]
            deep = kept[:, self.width :] if selection.merge is None or not deep.shape[1] else selection.merge(deep)
            kept = torch.cat([selection.features.to(kept.dtype), deep], dim=1)
        counts = list(selection.counts)
        images = zip(kept.split(counts), local.split(counts), layouts, strict=True)
        self.last = [PrunedImage(*image) for image in images]
        return self.last

    def _batch(self, features: Tensor, visuals: EncodedVisuals, budgets: tuple[int, ...]) -> VisualBatch:
        family, count = self.family, len(visuals.counts)
        shown = [ShownVisuals(visuals, tuple(range(count)))]
        vision, tile_vision = read_signals(family, self.signals, shown, self.method.needs, features.device)
        return VisualBatch(
            features=features,
            counts=visuals.counts,
            budgets=budgets,
            layouts=visuals.layouts(family),
            tower=family.tower_facts,
            vision=vision,
            tile_vision=tile_vision,
            project=family.project,
            modalities=("image",) * count,
        )

    def _check_layers(self) -> None:
        built = self.family.built_layers
        for signal in self.signals:
            if signal.kind != "features" and signal.layer >= built:
                raise UnsupportedMethodError(
                    f"{self.method.name!r} reads layer {signal.layer} of the vision tower, and vLLM builds {built} layers, up to "
                    "the one that gives the visual tokens."
                )
