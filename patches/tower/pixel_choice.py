"""A packed vision tower that runs only on the patches that a method chose by their pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property, partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from vlmprune.errors import UnsupportedCallError
from vlmprune.methods.batch import VisionSignal
from vlmprune.methods.input.pixelprune_pixels import first_frame, token_pixels
from vlmprune.methods.input_method import InputMethod

from ..call_options import OptionsInForce
from ..calls import CallStack
from ..hooks import HookSet

if TYPE_CHECKING:
    from ..families.family import Family

KEPT_PIXELS = VisionSignal("kept_pixels", 0)
_CHOICE = ("pixel choice", 0)


@dataclass(eq=False)
class ChosenPatches:
    """What one run of the tower runs on.

    Attributes:
        tokens: bool `[tokens]`, the chosen visual tokens in raster order, images one after the other.
        order: int64 `[tokens]`, the raster place of the token at each place of the tower's order; None where they are the same.
        merge: patches of a token.
    """

    tokens: Tensor
    order: Tensor | None
    merge: int
    _shortened: dict[int, tuple[object, object]] = field(default_factory=dict)

    @cached_property
    def in_order(self) -> Tensor:
        """The chosen tokens in the tower's order, bool `[tokens]`."""
        return self.tokens if self.order is None else self.tokens[self.order]

    @cached_property
    def patches(self) -> Tensor:
        """The chosen patches in the tower's order, int64."""
        return self.in_order.repeat_interleave(self.merge).nonzero()[:, 0]

    @cached_property
    def rows(self) -> Tensor:
        """For the token at each place of the tower's order, the row of the chosen one that stands for it, int64 `[tokens]`."""
        raster = torch.arange(len(self.tokens), device=self.tokens.device)
        # The first token of every image is chosen or follows one, of this image or the one before.
        before = torch.where(self.tokens, raster, self.tokens.long().argmax()).cummax(0).values
        own = self.in_order.cumsum(0) - 1
        if self.order is None:
            return own[before]
        place = torch.empty_like(raster).scatter_(0, self.order, raster)
        return own[place[before[self.order]]]

    def bounds(self, cu_seqlens: Tensor) -> Tensor:
        """Return the bounds of the sequences without patches that were not chosen; empty sequences go."""
        counts = torch.zeros(len(self.in_order) * self.merge + 1, dtype=torch.int64, device=self.tokens.device)
        counts[1:] = self.in_order.repeat_interleave(self.merge).cumsum(0)
        return counts[cu_seqlens.to(counts.device).long()].unique_consecutive().to(cu_seqlens)

    def shortened(self, arguments: dict[str, Any]) -> dict[str, Any]:
        """Return a block's keyword arguments for the chosen patches."""
        changed = dict(arguments)
        for name, shorten in (("cu_seqlens", self.bounds), ("position_embeddings", self._taken)):
            value = arguments[name]
            if id(value) not in self._shortened:
                # With the value itself, so that no other can get its id meanwhile.
                self._shortened[id(value)] = (value, shorten(value))
            changed[name] = self._shortened[id(value)][1]
        return changed

    def _taken(self, tables: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return tuple(table[self.patches.to(table.device)] for table in tables)


class PixelChoice:
    """The hooks on tower, blocks and mergers."""

    def __init__(self, family: Family, method: InputMethod, calls: CallStack, options: OptionsInForce) -> None:
        self.family = family
        self.method = method
        self.calls = calls
        self.options = options

    def install(self, hooks: HookSet) -> None:
        """Register the hooks; they act while images are encoded."""
        tower: Any = self.family.vision_tower
        hooks.before("vision tower pixels", tower, self._choose)
        for number, block in enumerate(tower.blocks):
            hooks.before(f"vision block {number} patches", block, partial(self._shorten, number))
        for number, merger in enumerate((tower.merger, *getattr(tower, "deepstack_merger_list", ()))):
            hooks.after(f"vision merger {number} tokens", merger, self._fill)

    def _choose(self, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not self.calls.tower:
            return
        method = self._method_in_force()
        pixels = args[0] if args else kwargs["hidden_states"]
        grid: Tensor = kwargs["grid_thw"] if "grid_thw" in kwargs else args[1]
        side = int(module.spatial_merge_size)
        grids = [(rows // side, columns // side) for frames, rows, columns in grid.tolist() for _ in range(frames)]
        counts = [frames * rows * columns // side**2 for frames, rows, columns in grid.tolist()]
        call = self.calls.tower[-1]
        if self.calls.tower[0].modality != "image" or all(method.budget(count) == count for count in counts):
            call.captured[KEPT_PIXELS] = torch.ones(sum(counts), 1, device=pixels.device)
            return
        frames = int(self.family.config.vision_config.temporal_patch_size)
        with torch.no_grad():
            values = first_frame(pixels.detach(), frames, *self.family.pixel_statistics)
            tokens = method.choose_pixels(token_pixels(values, side**2), grids)
        call.captured[KEPT_PIXELS] = tokens[:, None].float()
        if not bool(tokens.all()):
            order = self.family.tower_order(module, args, kwargs)
            call.captured[_CHOICE] = ChosenPatches(tokens, None if order is None else order.to(tokens.device), side**2)

    def _method_in_force(self) -> InputMethod:
        pipelines = self.options.current.pipelines
        if pipelines is None:
            return self.method
        if pipelines.by_row:
            raise UnsupportedCallError(
                f"{self.method.name!r} drops tokens before the tower, which knows of no rows; allowed: one keep for all rows."
            )
        return pipelines.pipelines[0].at_input

    def _chosen(self) -> ChosenPatches | None:
        return self.calls.tower[-1].captured.get(_CHOICE) if self.calls.tower else None

    def _shorten(self, number: int, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        chosen = self._chosen()
        if chosen is None:
            return None
        if number == 0:
            args = (args[0][chosen.patches.to(args[0].device)], *args[1:])
        return args, chosen.shortened(kwargs)

    def _fill(self, module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> Tensor | None:
        chosen = self._chosen()
        return None if chosen is None else output[chosen.rows.to(output.device)]
