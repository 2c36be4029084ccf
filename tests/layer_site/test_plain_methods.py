"""What methods inside the language model keep, against each method in plain loops over the unpatched layers."""

import pytest
import torch
from layer_site.by_hand import DEEP_LLAVA

import vlmprune
from support.plain_methods.aim import aim_merge, aim_pagerank
from support.plain_methods.catp import catp_first, catp_inside
from support.plain_methods.plain_layers import plain_row
from support.plain_methods.transprune import transprune
from vlmprune.methods import AIM, CATP, TransPrune

LAYERS = 8
ROWS = {"single": [[3, "A", 4, 7]], "three rows": [[3, "A", 4], [2, "B", 1, "C", 6], [9, 5, "D", 2, 8, 1]]}
over_rows = pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)


def records(model, method, rows):
    with torch.no_grad(), vlmprune.pruned(model, method):
        model(**DEEP_LLAVA.inputs(rows))
        images = vlmprune.last_run(model).images
    return [[image for image in images if image.batch_index == row] for row in range(len(rows))]


@over_rows
@pytest.mark.parametrize("keep", [0.3, 0.5, 11])
def test_transprune(rows, keep):
    model, method = DEEP_LLAVA.build(torch.float32), TransPrune(keep=keep)
    kept = records(model, method, rows)
    for row, mine in zip(rows, kept, strict=True):
        with torch.no_grad():
            plain = plain_row(model, DEEP_LLAVA, row, compact=True)
            counts = [dict(method.schedule(len(image), LAYERS)) for image in plain.images]
            transprune(plain, {layer: [count[layer] for count in counts] for layer in counts[0]}, LAYERS)
        assert [image.kept.tolist() for image in mine] == [plain.local(image) for image in range(len(plain.images))]


@over_rows
@pytest.mark.parametrize(
    "method", [AIM(keep=0.2), AIM(keep=0.8), AIM(keep=9), AIM(merge_rounds=1, layers=(2, 6))], ids=repr
)
def test_aim(rows, method):
    model = DEEP_LLAVA.build(torch.float32)
    kept = records(model, method, rows)
    _, inside = method.parts()
    for row, mine in zip(rows, kept, strict=True):
        with torch.no_grad():
            plain = plain_row(model, DEEP_LLAVA, row, compact=True)
            totals = [len(image) for image in plain.images]
            for image in range(len(plain.images)):
                places, values = aim_merge(plain.hidden[plain.alive(image)], method.budget(totals[image]))
                assert mine[image].stages[0][1].tolist() == places
                columns = plain.images[image][torch.tensor(places)]
                plain.keep(image, torch.isin(plain.columns, columns).nonzero().flatten())
                plain.hidden[plain.alive(image)] = values
            # What enters the first layer closes its gaps, and nothing does after that.
            plain.close_gaps()
            counts = [dict(inside.schedule(method.budget(total), LAYERS)) for total in totals]
            aim_pagerank(plain, {layer: [count[layer] for count in counts] for layer in counts[0]}, LAYERS)
        assert [image.kept.tolist() for image in mine] == [plain.local(image) for image in range(len(plain.images))]


@pytest.mark.parametrize(
    "rows",
    [
        [[3, "A", 4, 7]],
        [[3, "A", 4, 1, "B", 2, 9, "C", 5, 6, 8]],
        [[3, "A", 4], [2, "B", 1, "C", 6, 7], [9, "C", 1, 2, "A", 3, "D", 5]],
    ],
    ids=["single", "two shots", "three rows"],
)
@pytest.mark.parametrize("ratio", [0.5, 7 / 9])
def test_catp(rows, ratio):
    model, layer = DEEP_LLAVA.build(torch.float32), 2
    kept = records(model, CATP(ratio=ratio, layer=layer), rows)
    for row, mine in zip(rows, kept, strict=True):
        with torch.no_grad():
            plain = plain_row(model, DEEP_LLAVA, row, compact=True)
            totals = [len(image) for image in plain.images]
            words = [plain.text_after(image).tolist() for image in range(len(totals))]
            firsts = []
            for image, total in enumerate(totals):
                following = [w for w in words[image] if image + 1 == len(totals) or w < plain.images[image + 1].min()]
                text, tokens = plain.hidden[following], plain.hidden[plain.images[image]]
                firsts.append(catp_first(tokens, text, int(total * (1 - ratio / 2) + 1e-9)))
                assert mine[image].stages[0][1].tolist() == firsts[-1]
            for image, first in enumerate(firsts):
                columns = plain.images[image][torch.tensor(first)]
                plain.keep(image, torch.isin(plain.columns, columns).nonzero().flatten())
            plain.close_gaps()
            left = [int((1 - ratio) * sum(some) + 1e-9) for some in (totals[:-1], totals[-1:])]
            catp_inside(plain, layer, *left, LAYERS)
        assert [image.kept.tolist() for image in mine] == [plain.local(image) for image in range(len(plain.images))]
