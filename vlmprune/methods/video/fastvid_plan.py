"""How FastVID cuts a video in scenes and spreads its budget over their frames."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

import torch

from vlmprune.methods.shared.apportion import apportion
from vlmprune.methods.shared.frame_segments import lengths_between

Form = Literal["qwen", "video", "onevision"]


class FrameShares(NamedTuple):
    """Tokens that each frame of a video keeps.

    Attributes:
        salient: as they are.
        context: as centres that others are merged into; 0 in frames that are no anchor.
    """

    salient: tuple[int, ...]
    context: tuple[int, ...]


def fastvid_scenes(alike: Sequence[float], least: int, threshold: float) -> tuple[int, ...]:
    """Return the lengths of the scenes: cut where neighbours are unlike, and where they are least alike.

    Args:
        alike: cosine of every frame and the next one.
        least: scenes that there are at least, as far as there are frames.
        threshold: cosine below which there is a cut.
    """
    lowest = torch.tensor(list(alike)).sort(stable=True).indices[: max(0, least - 1)].tolist()
    cuts = {*lowest, *(frame for frame, cosine in enumerate(alike) if cosine < threshold)}
    return lengths_between(cuts, len(alike) + 1)


def shown_frames(alike: Sequence[float], lengths: Sequence[int], ignore: float | None) -> list[list[int]]:
    """Return the frames of every scene that keep anything: of neighbours that are as alike as `ignore` only the last.

    Args:
        alike: cosine of every frame and the next one.
        lengths: frames per scene.
        ignore: the cosine; None for all frames.
    """
    shown, first = [], 0
    for length in lengths:
        last = first + length - 1
        frames = range(first, last + 1)
        shown.append([frame for frame in frames if frame == last or ignore is None or alike[frame] < ignore])
        first += length
    return shown


def anchors_of(shown: Sequence[int], step: int) -> list[int]:
    """Return the frames of a scene that have centres: its last, and every `step`-th before it, last first."""
    return list(shown)[::-1][::step]


def official_shares(
    form: Form,
    tokens: int,
    budget: int,
    share: float,
    shown: Sequence[Sequence[int]],
    lengths: Sequence[int],
    step: int,
) -> FrameShares:
    """Return the shares by the arithmetic of an official code, which may lose some of the budget.

    Args:
        form: whose code.
        tokens: tokens of a frame.
        budget: tokens that a frame should keep.
        share: of these, as context.
        shown: the frames of every scene that keep anything.
        lengths: frames per scene.
        step: from one anchor to the next.
    """
    frames = sum(lengths)
    salient, context = [0] * frames, [0] * frames
    for scene, length in zip(shown, lengths, strict=True):
        anchors = anchors_of(scene, step)
        if form == "onevision":
            of_frame = int(budget * share)
            for frame in scene:
                salient[frame] = budget - of_frame
            for frame in anchors:
                context[frame] = of_frame * length // len(anchors)
            continue
        total = budget * length
        all_context = int(total * share)
        if form == "qwen":
            all_context = max(all_context, 1)
        _deal(salient, total - all_context, scene)
        _deal(context, all_context, anchors)
        if form == "qwen":
            for frame in scene:
                context[frame] = min(context[frame], tokens // 2)
                salient[frame] = min(salient[frame], tokens - context[frame])
    # Where an anchor has too few other tokens, the official codes for LLaVA fail.
    context = [min(count, tokens - held) for count, held in zip(context, salient, strict=True)]
    return FrameShares(tuple(salient), tuple(context))


def exact_shares(
    tokens: int, budget: int, share: float, shown: Sequence[Sequence[int]], lengths: Sequence[int], step: int
) -> FrameShares:
    """Return shares that sum to `budget`, or to all tokens of the frames that keep anything if these are fewer.

    Scenes get it in proportion to their lengths; `share` of it is context, at most half of an anchor frame, and the rest
    is spread evenly over the frames.

    Args:
        tokens: tokens of a frame.
        budget: tokens that the video keeps.
        share: of these, as context.
        shown: the frames of every scene that keep anything.
        lengths: frames per scene.
        step: from one anchor to the next.
    """
    room = torch.tensor([[len(scene) * tokens for scene in shown]])
    totals = apportion(torch.tensor([budget]), torch.tensor([list(lengths)]).double(), room)[0].tolist()
    frames = sum(lengths)
    salient, context = [0] * frames, [0] * frames
    for total, scene in zip(totals, shown, strict=True):
        anchors = anchors_of(scene, step)
        # A scene that keeps anything has a centre, unless nothing is to be context.
        wanted = max(round(total * share), 1) if total and share else 0
        _deal(context, min(wanted, total), anchors)
        for frame in anchors:
            context[frame] = min(context[frame], max(1, tokens // 2))
        left = total - sum(context[frame] for frame in scene)
        free = torch.tensor([[tokens - context[frame] for frame in scene[::-1]]])
        even = apportion(torch.tensor([left]), torch.ones(free.shape), free)[0].tolist()
        for frame, count in zip(scene[::-1], even, strict=True):
            salient[frame] = count
    return FrameShares(tuple(salient), tuple(context))


def _deal(shares: list[int], total: int, frames: Iterable[int]) -> None:
    """Split `total` over `frames`; the first ones get one more where it does not come out even."""
    places = list(frames)
    each, more = divmod(total, len(places))
    for rank, frame in enumerate(places):
        shares[frame] = each + (rank < more)
