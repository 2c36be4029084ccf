"""What a prefill kept of an image, as pictures: one a stage, and one of the scores."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from vlmprune.layout import VisualLayout
from vlmprune.record import ImageRecord

from .painting import paint_kept, score_map
from .panes import Pane, panes_of
from .strip import strip
from .tower_pictures import Picture

FRAMES_IN_A_LINE = 8


@dataclass(frozen=True, eq=False)
class Panel:
    """One picture with the words over and under it.

    Attributes:
        title: what it shows ("fastv, layer 2").
        caption: how many tokens that is.
        picture: uint8 `[height, width, 3]`; None where the layout has no geometry, which `kept` then stands for.
        kept: bool `[tokens]`, which visual tokens are alive.
        panes: with scores, the parts of the picture with a map `[rows, columns]` each; else nothing.
    """

    title: str
    caption: str
    picture: Picture | None
    kept: NDArray[np.bool_]
    panes: Sequence[tuple[Pane, NDArray[np.float32]]] = ()


def whole_panel(layout: VisualLayout, pictures: Sequence[Picture], patch_size: int, title: str) -> Panel:
    """Return the panel of an image of which nothing was dropped."""
    panes = panes_of(layout, pictures, patch_size)
    kept = np.ones(layout.total, dtype=bool)
    return Panel(title, f"{layout.total} tokens", _composed([pane.picture for pane in panes]), kept)


def stage_panels(record: ImageRecord, pictures: Sequence[Picture], patch_size: int, title: str) -> list[Panel]:
    """Return a panel for the entry of the language model and one for every layer at which tokens are dropped inside it.

    Args:
        record: the image.
        pictures: what the tower saw of it.
        patch_size: side of the tower's patches in pixels.
        title: names of the methods.
    """
    panes = panes_of(record.layout, pictures, patch_size)
    panels, groups = [], record.groups
    later = dict(record.stage_groups)
    for layer, kept in record.stages:
        if layer in later:
            groups = torch.where(groups >= 0, later[layer][groups.clamp(min=0)], -1)
        alive = (groups >= 0).numpy()
        shown = _tower_groups(record) if groups.unique().numel() == record.total else groups
        painted = [paint_kept(pane, alive, shown.numpy()) for pane in panes]
        name = title if layer == 0 else f"{title}, layer {layer}"
        panels.append(Panel(name, f"{len(kept)} of {record.total} tokens", _composed(painted), alive))
    # A method inside the language model alone shows nothing at the entry.
    return panels[1:] if len(panels) > 1 and len(record.stages[0][1]) == record.total else panels


def score_panel(record: ImageRecord, scores: Tensor, pictures: Sequence[Picture], patch_size: int, title: str) -> Panel:
    """Return the panel of what the method ranked the visual tokens by."""
    panes = panes_of(record.layout, pictures, patch_size)
    values = scores.float().numpy()
    maps = [(pane, score_map(pane, values)) for pane in panes]
    return Panel(f"{title}, scores", "", None, np.isfinite(values), maps)


def _tower_groups(record: ImageRecord) -> Tensor:
    """Return for each visual token the token of the tower that its patch went into, numbered over all tiles."""
    layout, groups = record.layout, record.tower_groups
    if groups is None or layout.tile_grid is None or groups.shape[1] != layout.tile_grid[0] * layout.tile_grid[1]:
        return record.groups
    numbered = torch.where(groups >= 0, groups + torch.arange(len(groups))[:, None] * groups.shape[1], -1)
    patch = (layout.row * layout.tile_grid[1] + layout.column).clamp(min=0)
    return numbered[(layout.tile + layout.frame).clamp(max=len(groups) - 1), patch]


def _composed(pictures: Sequence[Picture]) -> Picture | None:
    return strip(pictures, FRAMES_IN_A_LINE) if pictures else None
