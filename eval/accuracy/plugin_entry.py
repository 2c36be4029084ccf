"""lmms-eval's plug-in entry point: `lmms-eval --model vlmprune --model_args pretrained=...,method=...,keep=...`."""

from __future__ import annotations

from lmms_eval.models.registry_v2 import ModelManifest


def manifest() -> ModelManifest:
    """The classes by their paths, so that finding the plug-in loads no model code."""
    return ModelManifest(
        model_id="vlmprune",
        chat_class_path="vlmprune.eval.accuracy.plugin_model.Vlmprune",
        simple_class_path="vlmprune.eval.accuracy.plugin_model.SimpleVlmprune",
    )
