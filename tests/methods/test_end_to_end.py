"""What a pruned model keeps, against each method in plain loops on what the unpatched vision tower computes."""

import pytest
import torch

import vlmprune
from support.plain_methods.hiprune import hiprune
from support.plain_methods.holov import holov
from support.plain_methods.textmonkey import textmonkey
from support.plain_methods.vispruner import vispruner
from support.plain_tower import plain_image
from support.tiny_models import LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED

# By method (and what is special): the plain choice, and parameters that both take.
PLAIN = {
    "hiprune": (hiprune, {"alpha": 0.5}),
    "holov": (holov, {"beta": 1.0}),
    "holov-paper": (holov, {"mode": "paper"}),
    "textmonkey": (textmonkey, {}),
    "vispruner": (vispruner, {"rho": 0.3}),
}
FAMILIES = [LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED]
ROWS = {"single": [[3, "A", 4]], "three rows": [[3, "A", 4], [2, "B", 1, "C", 6], [9, "D"]]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_kept_tokens_are_those_of_plain_loops(name, family, rows):
    choose, parameters = PLAIN[name]
    model = family.build(torch.float32)
    images = [item for row in rows for item in row if isinstance(item, str)]
    expected = [plain_image(model, family.image(image)["pixel_values"]) for image in images]
    for keep in (3, 11):
        with torch.no_grad(), vlmprune.pruned(model, name.partition("-")[0], keep=keep, **parameters):
            model(**family.inputs(rows))
            records = vlmprune.last_run(model).images
        for record, image in zip(records, expected, strict=True):
            assert record.kept.tolist() == choose(image, keep, **parameters)
