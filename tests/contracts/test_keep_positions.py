"""`keep_positions=True` around methods of every kind: as many tokens as without it, and those that carry position among them."""

import pytest
import torch

import vlmprune
from support.family_cases import FAMILY_CASES
from support.layerwise import Positions, default_positions, language_model_inputs, placeholders, row_by_layers
from support.matrix import METHOD_PARAMETERS, ONE_OF_EACH_KIND, fitting, serves
from support.position_ranks import ranked
from vlmprune.errors import ParameterError, UnsupportedMethodError
from vlmprune.methods.registry import make_method

ROWS = [[3, "A", 4, 5], [2, "B", 1, "small", 6], [9], [1, "large", 2]]
# Selecting and merging, in one stage and in several, and methods that find by themselves how many tokens stay.
EVERYWHERE = ("divprune", "pyramiddrop")
OTHERS = ("pool", "visionzip", "todre", "fastv", "sparsevlm", "visiondrop", "catp", "aim", "sink", "mustdrop")
MERGING = ("pool", "visionzip", "sparsevlm", "visiondrop", "aim", "mustdrop")


def has_one_table(family):
    """Whether all decoder layers rotate by the same table."""
    kinds = getattr(family.build(torch.float32).config.get_text_config(), "layer_types", None) or ()
    return "sliding_attention" not in kinds


@pytest.mark.parametrize("family", [case for case in FAMILY_CASES if not has_one_table(case)], ids=repr)
def test_decoders_with_several_tables_are_refused(family):
    with pytest.raises(UnsupportedMethodError, match="no one table"):
        vlmprune.apply(family.build(torch.float32), "divprune", keep=0.5, keep_positions=True)


def _cases():
    for name in (*EVERYWHERE, *OTHERS):
        for family in FAMILY_CASES if name in EVERYWHERE else ONE_OF_EACH_KIND:
            case = fitting(name, family)
            if serves(name, family) and has_one_table(family):
                few = (
                    name == "divprune"
                    or family is ONE_OF_EACH_KIND[0]
                    or (name == "pyramiddrop" and family in ONE_OF_EACH_KIND)
                )
                yield pytest.param(name, case, id=f"{name}-{case}", marks=() if few else pytest.mark.whole)


over_cases = pytest.mark.parametrize(("method", "family"), list(_cases()))


def applied(model, method, keep, **more):
    return vlmprune.pruned(model, method, keep=keep, **METHOD_PARAMETERS[method], **more)


@over_cases
def test_as_many_tokens_and_positions_among_them(method, family):
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad():
        with applied(model, method, 0.4):
            model(**inputs)
            free = vlmprune.last_run(model)
        with applied(model, method, 0.4, keep_positions=True):
            model(**inputs)
            run = vlmprune.last_run(model)
    if method == "pool":
        # Grids of fewer cells come near the budget; with positions it is met.
        assert [len(image.kept) for image in run.images] == [max(1, round(0.4 * image.total)) for image in run.images]
    else:
        assert run.visual_tokens_per_layer == free.visual_tokens_per_layer
    if method in MERGING or method == "catp":
        return
    given = language_model_inputs(model, inputs)
    for image in run.images:
        visual = placeholders(model, inputs["input_ids"][image.batch_index]).nonzero().flatten()
        before = sum(
            other.total for other in run.images[: run.images.index(image)] if other.batch_index == image.batch_index
        )
        columns = visual[before : before + image.total]
        positions = given["position_ids"]
        if positions is None:
            positions = inputs["attention_mask"].cumsum(1) - 1
        positions = positions[:, image.batch_index] if positions.ndim == 3 else positions[image.batch_index]
        alive = torch.arange(image.total)
        for _, kept in image.stages:
            if len(kept) == len(alive):
                continue
            ranks = ranked(model, positions, columns[alive])
            wanted = 2 * round(0.2 * len(kept))
            sure = {token for token, rank in zip(alive.tolist(), ranks, strict=True) if rank < wanted // 2 - 2}
            assert sure <= set(kept.tolist())
            alive = kept


@over_cases
def test_row_in_a_batch_equals_row_alone(method, family):
    model, batch = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad(), applied(model, method, 0.4, keep_positions=True):
        together = model(**batch).logits
        for row, items in enumerate(ROWS):
            alone = model(**family.inputs([items])).logits[0]
            valid = batch["attention_mask"][row].bool()
            torch.testing.assert_close(together[row, valid], alone, atol=2e-5, rtol=1e-4)


@over_cases
def test_identity(method, family):
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad():
        logits = model(**inputs).logits
        with applied(model, method, 1.0, keep_positions=True):
            assert torch.equal(model(**inputs).logits, logits)


@pytest.mark.parametrize(("method", "family"), [case for case in _cases() if case.values[0] in (*EVERYWHERE, "fastv")])
def test_layers_by_hand(method, family):
    """Positions are those of the full prompt, before the first layer and inside."""
    model, inputs = family.build(torch.float32), family.inputs(ROWS)
    with torch.no_grad(), applied(model, method, 0.4, keep_positions=True):
        logits = model(**inputs).logits
        run = vlmprune.last_run(model)
    given, trimmed = language_model_inputs(model, inputs), default_positions(model, method).trimmed
    for row in range(len(ROWS)):
        by_hand = row_by_layers(model, inputs, run, row, Positions(False, False, trimmed), given=given)
        torch.testing.assert_close(logits[row, by_hand.columns], by_hand.logits, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ivcprune", {}, "by its own rule"),
        ("hiprune", {"faithful": True}, "faithful=True"),
        ("pixelprune", {}, "before the vision tower"),
        ("divprune", {"keep_positions": "yes"}, "keep_positions='yes'"),
    ],
)
def test_what_cannot_be_is_refused(method, parameters, message):
    model = ONE_OF_EACH_KIND[2 if method == "pixelprune" else 0].build(torch.float32)
    with pytest.raises(ParameterError, match=message):
        vlmprune.apply(model, method, **{"keep_positions": True, **parameters})
    assert vlmprune.list_methods(model)


def test_a_method_with_an_object_and_another_budget():
    family = ONE_OF_EACH_KIND[0]
    model, inputs = family.build(torch.float32), family.inputs([[3, "A", 4]])
    with torch.no_grad(), vlmprune.pruned(model, make_method("divprune", 0.5, keep_positions=True)):
        with vlmprune.options(model, keep=7):
            model(**inputs)
        assert len(vlmprune.last_run(model).images[0].kept) == 7
