"""Named lists of lmms-eval tasks by the ability that they ask for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean

from vlmprune.errors import unknown


@dataclass(frozen=True)
class Suite:
    """What a suite is for, and by ability its tasks with their numbers of items as their authors published them."""

    purpose: str
    abilities: Mapping[str, Mapping[str, int]]

    @property
    def tasks(self) -> list[str]:
        """All tasks, each once."""
        return list(dict.fromkeys(task for tasks in self.abilities.values() for task in tasks))

    @property
    def items(self) -> int:
        """Items of all tasks together."""
        return sum({task: size for tasks in self.abilities.values() for task, size in tasks.items()}.values())


SUITES: Mapping[str, Suite] = {
    "image-core": Suite(
        "what papers on visual tokens report, as far as it is a share of right answers",
        {
            "scenes": {"gqa": 12578, "vizwiz_vqa_val": 4319, "realworldqa": 765},
            "knowledge": {"scienceqa_img": 2017, "ai2d": 3088, "mmmu_val": 900},
            "text": {"textvqa_val": 5000},
            "hallucination": {"pope": 9000},
        },
    ),
    "ocr": Suite(
        "reading, which loses first when tokens go",
        {
            "scene text": {"textvqa_val": 5000, "ocrbench": 1000},
            "documents": {"docvqa_val": 5349, "infovqa_val": 2801},
            "charts": {"chartqa": 2500},
        },
    ),
    "hallucination": Suite(
        "objects that are not there, asked for at random, by frequency, and by what they come with",
        {"random": {"pope_random": 3000}, "popular": {"pope_pop": 3000}, "adversarial": {"pope_adv": 3000}},
    ),
    "spatial": Suite(
        "counting, depth and place",
        {
            "counting": {"countbenchqa": 491},
            "relation and depth": {"cv_bench": 2638},
            "grounding": {"refcoco_bbox_rec_val": 8811},
        },
    ),
    "scenes": Suite(
        "the embedded tasks on drawn scenes, for models that lie in the repository",
        {
            "perception": {"scenes_attribute": 600, "scenes_existence": 600},
            "counting": {"scenes_counting": 600},
            "spatial": {"scenes_relation": 600},
            "text": {"scenes_reading": 600},
        },
    ),
}
"""Tasks that ask a judge model or give points in the place of a share (`mme`, `mmbench_en_dev`) have no place in a mean."""


def find_suites(names: Iterable[str]) -> list[Suite]:
    """The suites of these names.

    Raises:
        UnknownNameError: there is none of a name.
    """
    found = []
    for name in names:
        if name not in SUITES:
            raise unknown("suite", name, list(SUITES))
        found.append(SUITES[name])
    return found


def ability_means(suites: Sequence[Suite], scores: Mapping[str, float]) -> dict[str, float]:
    """Mean score over the tasks of each ability; abilities of which a task was not run are left out."""
    found = {}
    for suite in suites:
        for ability, tasks in suite.abilities.items():
            if all(task in scores for task in tasks):
                found[ability] = fmean(scores[task] for task in tasks)
    return found
