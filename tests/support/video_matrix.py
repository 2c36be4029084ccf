"""The (method x family) matrix of videos: every method before the language model that serves them, every family that has them."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from support.families import glm4v, llava_next_video, llava_onevision, qwen2_5_vl, qwen2_vl, qwen3_5, qwen3_vl
from support.families.qwen_case import QwenCase
from support.matrix import ENCODER_METHODS, LIKE_ANOTHER, METHOD_PARAMETERS, ON_FEWER, TWINS, fitting
from support.tiny_models import FamilyCase, Row
from vlmprune.methods.needs import GRID, STILL_IMAGES
from vlmprune.methods.registry import METHODS, make_method
from vlmprune.patches.families.registry import find_family

QWEN_CASES = (*qwen2_vl.CASES, *qwen2_5_vl.CASES, *qwen3_vl.CASES, *qwen3_5.CASES)
VIDEO_CASES: tuple[FamilyCase, ...] = (*QWEN_CASES, *llava_onevision.CASES, *llava_next_video.CASES, *glm4v.CASES)

ROWS: dict[str, list[Row]] = {
    "one": [[3, "video", 4]],
    "several": [[3, "video", 2, "video small", 4], [1, "video large", 5]],
    "mixed": [
        [2, "A", 3, "video", 4],
        [1, "video small", 2, "small", 1, "video large", 2, "large", 2],
        [6],
        [2, "B", 2],
    ],
}

# Every family meets these; the other methods meet one with M-RoPE and text between frames, and one with a newline.
ON_EVERY_FAMILY = frozenset({"evs", "vidcom2", "fastervlm", "pool"})
ONE_OF_EACH_KIND = (qwen3_vl.CASES[0], llava_onevision.CASES[0])


def as_served(method: str, case: FamilyCase, rows: Sequence[Row]) -> list[Row]:
    """Return the rows with videos of one length where the host stacks them, and without images where
    their kind, or images beside videos, are not served."""
    if case.images_or_videos:
        return [[item for item in row if not isinstance(item, str) or "video" in item] for row in rows]
    if isinstance(case, QwenCase):
        return list(rows)
    needs = {need for part in make_method(method, **METHOD_PARAMETERS[method]).parts() for need in part.needs}
    if GRID in needs and not find_family(case.build(torch.float32)).has_grid:
        rows = [[item for item in row if not isinstance(item, str) or "video" in item] for row in rows]
    return [
        [item.replace("large", "B").replace("small", "C") if "video" in str(item) else item for item in row]
        for row in rows
    ]


def serves_videos(name: str) -> bool:
    """Whether all stages of a method but those in the vision tower serve videos."""
    return name not in ENCODER_METHODS and all(
        STILL_IMAGES not in part.needs for part in make_method(name, **METHOD_PARAMETERS[name]).parts()
    )


def _cases() -> list[object]:
    cases = []
    for family in VIDEO_CASES:
        facts = find_family(family.build(torch.float32))
        for name in METHOD_PARAMETERS:
            parts = make_method(name, **METHOD_PARAMETERS[name]).parts()
            if serves_videos(name) and all(need.met_by(facts) for part in parts for need in part.needs):
                everywhere = ON_FEWER if family in LIKE_ANOTHER else ON_EVERY_FAMILY
                everywhere = frozenset() if family in TWINS else everywhere
                marks = () if name in everywhere or family in ONE_OF_EACH_KIND else (pytest.mark.whole,)
                cases.append(pytest.param(name, fitting(name, family), id=f"{name}-{family}", marks=marks))
    return cases


VIDEO_MATRIX = _cases()
over_video_matrix = pytest.mark.parametrize(("method", "case"), VIDEO_MATRIX)
SERVING = [name for name in METHODS if name in METHOD_PARAMETERS and serves_videos(name)]


def replaces_values(name: str) -> bool:
    """Whether a method gives kept tokens other values."""
    return any(part.merges for part in make_method(name, **METHOD_PARAMETERS[name]).parts())
