"""What methods read of the vision tower beside attention: the projector's input, keys, the CLS token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch

import vlmprune
from support.family_cases import FAMILY_CASES
from support.plain_tower import plain_image
from support.tiny_models import LLAVA_CLIP_GQA
from vlmprune.methods.batch import Selection, VisionSignal
from vlmprune.methods.input_method import InputMethod

SEEN = []


@dataclass(frozen=True, kw_only=True)
class Probe(InputMethod):
    """Keeps the batch that it is given."""

    kinds: tuple[str, ...] = ("features",)

    name: ClassVar[str] = "probe"

    def vision_signals(self, tower):
        return tuple(VisionSignal(kind, tower.feature_layer) for kind in self.kinds)

    def select(self, batch):
        SEEN[:] = [batch]
        kept = [torch.arange(budget) for budget in batch.budgets]
        return Selection(torch.cat(kept), batch.budgets)


def probed(family, rows, kinds=("features",)):
    model = family.build(torch.float32)
    with torch.no_grad(), vlmprune.pruned(model, Probe(keep=0.5, kinds=kinds)):
        model(**family.inputs(rows))
        return model, SEEN[0]


@pytest.mark.parametrize("family", FAMILY_CASES, ids=str)
def test_projected_features_are_the_visual_tokens(family):
    _, batch = probed(family, [[3, "A", 4], [2, "B", 1, "small", 6], [9], ["large", 2]])
    (features,) = batch.vision.values()
    projected = batch.project(features)
    compared = 0
    for index, layout in enumerate(batch.layouts):
        image = getattr(layout, "image", None)
        if image is None or image.resized is None:
            span = torch.arange(batch.offsets[index], batch.offsets[index + 1])[~layout.newline]
            torch.testing.assert_close(projected[span], batch.features[span], atol=1e-5, rtol=1e-5)
            compared += 1
    assert compared
    newline = torch.cat([layout.newline for layout in batch.layouts])
    assert (features[newline] == 0).all()


def test_keys_and_the_cls_token_are_those_of_plain_products():
    kinds = ("keys", "cls_features", "cls_attention_one_head")
    model, batch = probed(LLAVA_CLIP_GQA, [[3, "A", 4, "B"]], kinds)
    keys, cls_rows, one_head = (VisionSignal(kind, batch.tower.feature_layer) for kind in kinds)
    for index, name in enumerate("AB"):
        image = plain_image(model, LLAVA_CLIP_GQA.image(name)["pixel_values"])
        span = slice(batch.offsets[index], batch.offsets[index + 1])
        key = image.keys[image.feature_layer].flatten(1)
        torch.testing.assert_close(batch.vision[keys][span], key[1:])
        torch.testing.assert_close(batch.tile_vision[cls_rows][index], image.states[:1])
        query = image.queries[image.feature_layer].flatten(1)
        row = (query[0] @ key.T * key.shape[1] ** -0.5).softmax(-1)
        torch.testing.assert_close(batch.vision[one_head][span], row[1:, None])
