"""What a pruned model keeps and merges, against each method in plain loops on what the unpatched vision tower computes."""

import pytest
import torch

import vlmprune
from support.plain_methods.hiprune import hiprune
from support.plain_methods.holov import holov
from support.plain_methods.scope import scope
from support.plain_methods.textmonkey import textmonkey
from support.plain_methods.tokencorr import tokencorr
from support.plain_methods.visionzip import visionzip
from support.plain_methods.vispruner import vispruner
from support.plain_methods.zooprune import zooprune
from support.plain_tower import plain_image
from support.tiny_models import IMAGE_TOKEN, LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED

# By method (and what is special): the plain choice, which gives the kept tokens and of merging methods their values too, and
# parameters that both take.
PLAIN = {
    "hiprune": (hiprune, {"alpha": 0.5}),
    "holov": (holov, {"beta": 1.0}),
    "holov-paper": (holov, {"mode": "paper"}),
    "scope": (scope, {}),
    "scope-add": (scope, {"combined": "add", "alpha": 2.0}),
    "textmonkey": (textmonkey, {}),
    "tokencorr": (tokencorr, {"sim_threshold": 0.3, "min_count": 3}),
    "vispruner": (vispruner, {"rho": 0.3}),
    "visionzip": (visionzip, {}),
    "visionzip-projected": (visionzip, {"merge_at": "projected", "contextual": 0.4}),
    "visionzip-tower": (visionzip, {"merge_at": "tower", "cls_token": False}),
    "zooprune": (zooprune, {"sketch": None}),
    "zooprune-differences": (zooprune, {"sketch": None, "h": 0.1, "m": 5}),
}
# Methods that find their own count without `keep`.
ADAPTIVE = {"tokencorr": (None,)}
FAMILIES = [LLAVA_CLIP_GQA, LLAVA_SIGLIP_TIED]
ROWS = {"single": [[3, "A", 4]], "three rows": [[3, "A", 4], [2, "B", 1, "C", 6], [9, "D"]]}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("family", FAMILIES, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_kept_tokens_and_values_are_those_of_plain_loops(name, family, rows):
    choose, parameters = PLAIN[name]
    model = family.build(torch.float32)
    images = [item for row in rows for item in row if isinstance(item, str)]
    plain = [plain_image(model, family.image(image)["pixel_values"]) for image in images]
    for keep in (1, 3, 11, *ADAPTIVE.get(name, ())):
        with torch.no_grad(), vlmprune.pruned(model, name.partition("-")[0], keep=keep, **parameters):
            entered = entering_embeddings(model, family.inputs(rows))
            records = vlmprune.last_run(model).images
        for record, image, values in zip(records, plain, entered(records, rows), strict=True):
            with torch.no_grad():
                expected = choose(image, keep, **parameters)
            kept, merged = expected if isinstance(expected, tuple) else (expected, image.features[expected])
            assert record.kept.tolist() == kept
            torch.testing.assert_close(values, merged, atol=1e-5, rtol=1e-4)


def entering_embeddings(model, inputs):
    """Run the pruned model; return what gives the visual tokens per image that entered its language model."""
    seen = []
    handle = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    try:
        model(**inputs)
    finally:
        handle.remove()
    ids, mask = inputs["input_ids"], inputs["attention_mask"].bool()

    def per_image(records, rows):
        for row in range(len(rows)):
            visual = (ids[row] == IMAGE_TOKEN).nonzero().flatten()
            columns, start = mask[row] & (ids[row] != IMAGE_TOKEN), 0
            mine = []
            for record in (record for record in records if record.batch_index == row):
                mine.append(visual[start : start + record.total][record.kept])
                columns[mine[-1]] = True
                start += record.total
            rank = columns.cumsum(0) - 1 + seen[0].shape[1] - int(columns.sum())
            for places in mine:
                yield seen[0][row, rank[places]]

    return per_image
