"""What each visual token of a clip shows, and what it shows has to do with time."""

from __future__ import annotations

import numpy as np

from ..common.scenes import MAX_COUNT, SHAPES
from ..qwen.labels import scene_labels
from .clips import FRAMES, SIZE, Clip

EVENTS = ("nothing", "stays", "came", "moved")
"""What can be said of a thing at a moment from what was to be seen until then."""
RANKS = MAX_COUNT + 1
"""Classes of the place of a thing in the order of those that come; 0: it was there from the start."""


def clip_labels(clip: Clip) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Labels of all moments, `int64`, and ways, `float32`.

    Returns:
        Labels of patches (moments, labels, tokens, 4) and of tokens (moments, labels, tokens) as in `scene_labels`, the event
        (`EVENTS`) and rank (moments, tokens) of what each token shows, and the way that this has gone from where it was first
        (moments, tokens, 2), in rows and columns as shares of a frame.
    """
    patches, tokens, events, ranks, ways = [], [], [], [], []
    order = {actor.shape: place for place, actor in enumerate(clip.arrivals, start=1)}
    for moment in range(clip.moments):
        scene = clip.scene(moment, text=clip.text_frame // FRAMES == moment)
        of_patches, of_tokens = scene_labels(scene)
        event, rank = np.zeros((2, len(SHAPES) + 1), np.int64)
        way = np.zeros((len(SHAPES) + 1, 2), np.float32)
        for actor in clip.actors:
            name = "moved" if actor.moved(moment) else "came" if actor.first else "stays"
            event[actor.shape + 1] = EVENTS.index(name)
            rank[actor.shape + 1] = order.get(actor.shape, 0)
            now, first = actor.places[moment], actor.places[actor.first]
            if now is not None and first is not None:
                way[actor.shape + 1] = (now[1] - first[1]) / SIZE, (now[0] - first[0]) / SIZE
        patches.append(of_patches)
        tokens.append(of_tokens)
        events.append(event[of_tokens[0]])
        ranks.append(rank[of_tokens[0]])
        ways.append(way[of_tokens[0]])
    return np.stack(patches), np.stack(tokens), np.stack(events), np.stack(ranks), np.stack(ways)
