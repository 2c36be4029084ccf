"""lmms-eval's plug-in entry point: `lmms-eval --model vlmprune --model_args pretrained=...,method=...,keep=...`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The class by its path, so that finding the plug-in loads no model code.

    It is of lmms-eval's simple protocol, the only one in which multiple choice is possible; tasks with messages of their own
    are asked for them all the same (see `generation_question`).
    """
    return ModelManifest(
        model_id="vlmprune",
        simple_class_path="vlmprune.eval.plugin.model.Vlmprune",
    )
