"""What selecting visual tokens costs, as a share of the prefill time that dropping them saves."""

from __future__ import annotations

import random
import statistics
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import vlmprune
from vlmprune.errors import BudgetError
from vlmprune.eval.models.memory import garbage_kept
from vlmprune.eval.models.visual_tokens import visual_tokens
from vlmprune.eval.run.cells import Cell, LeftOut, not_reachable
from vlmprune.methods.needs import PIXELS

from .hook_clock import HookClock
from .hook_memory import HookMemory
from .ideal_prefill import IdealPrefill, encode_images
from .rounds import CLOCKS, clocked, spread
from .shared_encodings import SharedEncodings

REPEATS = 2
TOWER_ALONE = frozenset({"encoder"})
INSIDE = frozenset({"layer", "attention"})
NOTHING_SAVED = {"median": float("inf"), "q25": float("inf"), "q75": float("inf")}


@dataclass(frozen=True)
class SelectionCost:
    """One method. Times are milliseconds (median and quartiles) of what `where` names.

    `where`: "language model", its prefill without tower and projector, or, for methods that act nowhere else, "vision tower",
    encoding the picture; `clock`: "wall", or "cpu" for the processor time of all threads;
    `selection`: all that the method adds to a call (reading the tower, scores, picking, compaction, handing back);
    for a method that changes attention all that its hooks in the layers add to the prefill, later steps apart;
    `full` and `pruned` prefill, the latter with the selection; `saved` their difference;
    `share` selection over saved, infinite for a method that drops nothing;
    `ideal` the unpatched layers on the tokens that each of them sees (for the tower, `pruned` without the selection);
    `overhead` pruned over ideal. `selection_peak_bytes`: the most that one of the method's hooks takes beside what was there
    before it; None where the system does not tell, and for methods inside tower or language model.
    """

    title: str
    where: str
    clock: str
    keep: float | int | None
    visual_tokens_before: int
    visual_tokens_after: float
    text_tokens: int
    selection: dict[str, float]
    full: dict[str, float]
    pruned: dict[str, float]
    ideal: dict[str, float]
    saved: dict[str, float]
    share: dict[str, float]
    overhead: dict[str, float]
    rounds: int
    selection_peak_bytes: int | None = None


def measure_selection(
    model: PreTrainedModel,
    inputs: dict[str, Tensor],
    cells: Sequence[Cell],
    rounds: int,
    on_left_out: Callable[[LeftOut], None] | None = None,
    tower_model: PreTrainedModel | None = None,
    clock: str = "wall",
    depth: float = 1.0,
) -> list[SelectionCost]:
    """Measure every cell on one request, in rounds over all cells.

    A method that acts before the language model is measured with its layers taken out, which do the same whoever chose the
    tokens; its prefill is that of the layers on as many tokens, timed once a round for all methods that keep as many, and its
    selection. A method that drops or changes attention inside is measured in the whole call, and its ideal right after. A
    method that acts in the vision tower alone is measured there, in the one of `tower_model`. Methods that leave the tower as it
    is and read the same of it share one encoding a round, and those that read nothing one for all rounds. A cell whose budget
    the request does not allow is left out, and `on_left_out` told.

    Args:
        model: its tower may be short, since methods behind it do not change what it costs.
        inputs: the request.
        cells: methods at budgets.
        rounds: over all cells.
        on_left_out: is told of cells that are left out.
        tower_model: a model with the whole tower; `model` itself where there is none.
        clock: a name in `CLOCKS`.
        depth: how many layers each layer of the language model stands for; if not 1, methods that act inside the language model
            are left out.
    """
    bench = _SelectionBench(model, inputs, cells, tower_model or model, clock, depth)
    order = random.Random(0)
    with torch.inference_mode():
        for _ in range(rounds):
            bench.round(order.sample(bench.cells, len(bench.cells)))
    for item in bench.left_out:
        if on_left_out is not None:
            on_left_out(item)
    return bench.results()


class _SelectionBench:
    def __init__(
        self,
        model: PreTrainedModel,
        inputs: dict[str, Tensor],
        cells: Sequence[Cell],
        tower_model: PreTrainedModel,
        clock: str,
        layer_depth: float = 1.0,
    ) -> None:
        self.layer_depth = layer_depth
        self.model, self.inputs, self.tower_model, self.clock_name = model, inputs, tower_model, clock
        self.cells = [cell for cell in cells if cell.is_pruned]
        self.clock = HookClock(model.device, CLOCKS[clock])
        self.visual = int(visual_tokens(model.config, inputs["input_ids"][0]).sum())
        self.depth = int(model.config.get_text_config().num_hidden_layers)
        self.encoded: Any = None
        self.encodings = SharedEncodings()
        self.full: list[float] = []
        self.tower: list[float] = []
        self.times: dict[str, list[tuple[float, float, float]]] = {cell.label: [] for cell in self.cells}
        self.layers: dict[str, list[int]] = {}
        self.left_out: list[LeftOut] = []
        self.peaks: dict[str, int | None] = {}
        if layer_depth != 1:
            inside = [cell for cell in self.cells if INSIDE & sites_of(cell)]
            self.cells = [cell for cell in self.cells if cell not in inside]
            reason = (
                "It acts inside the language model, whose layers do not all run here; allowed: --language-layers 0."
            )
            self.left_out += [LeftOut(cell.title, cell.keep, "not served", reason) for cell in inside]

    def round(self, cells: Sequence[Cell]) -> None:
        if self.encoded is None:
            self.encoded = encode_images(self.model, self.inputs)
            modality = "video" if self.inputs.get("pixel_values_videos") is not None else "image"
            self.encodings.keep(modality, (), self.encoded, {}, 0.0)
        self.encodings.forget_signals()
        sites = {cell.label: sites_of(cell) for cell in cells}
        if any(found != TOWER_ALONE for found in sites.values()):
            self.full.append(self._layers_alone([self.visual] * self.depth))
        if any(found == TOWER_ALONE for found in sites.values()):
            if not self.tower:
                encode_images(self.tower_model, self.inputs)
            self.tower.append(self._timed(lambda: encode_images(self.tower_model, self.inputs)))
        alone: dict[tuple[int, ...], float] = {}
        for cell in cells:
            inside = bool(INSIDE & sites[cell.label])
            try:
                if sites[cell.label] == TOWER_ALONE:
                    selection, pruned = self._pruned_tower(cell)
                    self.times[cell.label].append((selection, pruned, pruned - selection))
                    continue
                selection, pruned = self._pruned(cell, inside)
            except BudgetError as error:
                self.cells.remove(cell)
                self.left_out.append(not_reachable(cell, error))
                continue
            kept = tuple(self.layers[cell.label])
            if inside or kept not in alone:
                alone[kept] = self._layers_alone(kept)
            self.times[cell.label].append((selection, pruned if inside else alone[kept] + selection, alone[kept]))

    def _pruned(self, cell: Cell, inside: bool) -> tuple[float, float]:
        encodings = self.encodings if leaves_tower_alone(cell) else None
        with cell.applied_to(self.model), self.clock.watching(self.model, encodings):
            if inside:
                times = self._call()
            else:
                with without_layers(self.model):
                    if not self.times[cell.label]:
                        self.peaks[cell.label] = self._peak()
                    times = statistics.median(self._call()[0] for _ in range(REPEATS)), 0.0
            self.layers[cell.label] = vlmprune.last_run(self.model).visual_tokens_per_layer[0]
        return times

    def _pruned_tower(self, cell: Cell) -> tuple[float, float]:
        """Seconds in hooks, and of encoding the picture, hooks included."""
        with cell.applied_to(self.tower_model), self.clock.watching(self.tower_model):
            if not self.times[cell.label]:
                encode_images(self.tower_model, self.inputs)
            self.clock.reset()
            whole = self._timed(lambda: encode_images(self.tower_model, self.inputs))
            self.layers[cell.label] = [self.visual]
        return self.clock.in_hooks, whole

    def _call(self) -> tuple[float, float]:
        """Seconds in hooks, and of the whole call without the tower."""
        self.clock.reset()
        whole = self._timed(lambda: self.model(**self.inputs, use_cache=True, logits_to_keep=1))
        return self.clock.in_hooks, whole - self.clock.in_tower + self.clock.from_before

    def _peak(self) -> int | None:
        """Bytes that the method's hooks take for themselves, in one call that is not timed."""
        memory = HookMemory(self.model.device)
        with memory.watching(self.model), garbage_kept():
            self.model(**self.inputs, use_cache=True, logits_to_keep=1)
        return memory.most

    def _layers_alone(self, kept: Sequence[int]) -> float:
        ideal = IdealPrefill.prepare(self.model, self.inputs, kept)
        return self.layer_depth * self._timed(lambda: ideal.after_tower(self.encoded))

    def _timed(self, call: Callable[[], Any]) -> float:
        return clocked(call, self.model.device, CLOCKS[self.clock_name])

    def results(self) -> list[SelectionCost]:
        found = []
        for cell in self.cells:
            selection, pruned, ideal = zip(*self.times[cell.label], strict=True)
            in_tower = sites_of(cell) == TOWER_ALONE
            whole = self.tower if in_tower else self.full
            saved = [full - after for full, after in zip(whole, pruned, strict=True)]
            shares = [cost / gain if gain > 0 else float("inf") for cost, gain in zip(selection, saved, strict=True)]
            found.append(
                SelectionCost(
                    title=cell.title,
                    where="vision tower" if in_tower else "language model",
                    clock=self.clock_name,
                    keep=cell.keep,
                    visual_tokens_before=self.visual,
                    visual_tokens_after=statistics.fmean(self.layers[cell.label]),
                    text_tokens=self.inputs["input_ids"].shape[1] - self.visual,
                    selection=spread(selection),
                    full=spread(whole),
                    pruned=spread(pruned),
                    ideal=spread(ideal),
                    saved=spread(saved),
                    share=spread(shares, 1)
                    if min(self.layers[cell.label]) < self.visual or in_tower
                    else NOTHING_SAVED,
                    overhead=spread([after / least for after, least in zip(pruned, ideal, strict=True)], 1),
                    rounds=len(whole),
                    selection_peak_bytes=self.peaks.get(cell.label),
                )
            )
        return found


def sites_of(cell: Cell) -> frozenset[str]:
    """Where the method of a cell acts."""
    method = cell.make_method()
    return frozenset() if method is None else frozenset(part.site for part in method.parts())


def leaves_tower_alone(cell: Cell) -> bool:
    """Whether the tower gives under the method of a cell what it gives without it."""
    method = cell.make_method()
    return method is None or not any(part.site == "encoder" or PIXELS in part.needs for part in method.parts())


class _LayersThatDoNotRun(nn.ModuleList):
    """Decoder layers that a forward passes by; a method that reads one of them still finds it by its number."""

    def __getitem__(self, index: Any) -> Any:
        return nn.ModuleList() if isinstance(index, slice) else super().__getitem__(index)

    def __iter__(self) -> Iterator[nn.Module]:
        return iter(())


@contextmanager
def without_layers(model: PreTrainedModel) -> Iterator[None]:
    """The language model without its decoder layers while the context lasts."""
    language: Any = model.model.language_model
    layers = language.layers
    language.layers = _LayersThatDoNotRun(layers)
    try:
        yield
    finally:
        language.layers = layers
