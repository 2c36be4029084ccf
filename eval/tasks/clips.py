"""What the clip tasks' YAML files call: videos, which clips a task asks about, and scores.

lmms-eval loads this file by its path, so it imports nothing of the package around it; what it shares with the pictures' tasks it
loads in the same way.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

_spec = importlib.util.spec_from_file_location("vlmprune_task_scoring", Path(__file__).with_name("scoring.py"))
if _spec is None or _spec.loader is None:
    raise ImportError("scoring.py is not beside clips.py")
scoring = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(scoring)

FPS = 2.0
"""Frames of a clip in a second."""


def clip_video(document: dict[str, Any]) -> list[dict[str, Any]]:
    """The clip's frames as a video; frames that look alike are stored once, `order` says which follow each other."""
    frames = [frame.convert("RGB") for frame in document["frames"]]
    return [{"type": "video", "url": {"frames": [frames[number] for number in document["order"]], "fps": FPS}}]


score_motion, having_motion = scoring.exact_match("motion"), scoring.having("motion")
score_order, having_order = scoring.exact_match("order"), scoring.having("order")
score_counting, having_counting = scoring.exact_match("counting"), scoring.having("counting")
score_reading, having_reading = scoring.exact_match("reading"), scoring.having("reading")
score_happened, having_happened = scoring.exact_match("happened"), scoring.having("happened")
