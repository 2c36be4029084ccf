"""What encoder methods make of budgets and parameters, and what they refuse."""

import pytest

from vlmprune.errors import BudgetError, ParameterError, UnknownNameError
from vlmprune.methods import MCTF, CrossGET, Expedite, PiToMe, TokenTransforming, ZeroTPrune
from vlmprune.methods.batch import TowerFacts

CLIP_L = TowerFacts(layers=24, feature_layer=22, has_cls=True, heads=16)
SIGLIP = TowerFacts(layers=27, feature_layer=26, has_cls=False, heads=16)
TOWERS = [(CLIP_L, 576), (SIGLIP, 729)]
# Where tokens go only in some blocks, their sum is met by whole tokens there.
EVERYWHERE = (PiToMe, CrossGET)
SOMEWHERE = (MCTF, ZeroTPrune, TokenTransforming)


@pytest.mark.parametrize(("tower", "patches"), TOWERS, ids=["clip", "siglip"])
@pytest.mark.parametrize("cls", [*EVERYWHERE, *SOMEWHERE])
@pytest.mark.parametrize("keep", [0.9, 0.61, 0.45, 300])
def test_budgets_are_met(cls, keep, tower, patches):
    share = keep / patches if isinstance(keep, int) else keep
    merged = cls(keep=keep, output="merged").plan(patches, tower)
    assert merged[-1] == (keep if isinstance(keep, int) else round(keep * patches))
    full = cls(keep=keep).plan(patches, tower)
    blocks = tower.feature_layer + 1
    off = sum(full) - share * patches * blocks
    assert abs(off) <= 0.5 if cls in EVERYWHERE else -0.5 <= off <= blocks
    for plan in (merged, full):
        assert len(plan) == blocks
        assert all(now <= before for before, now in zip((patches, *plan), plan, strict=False))
    assert set(cls(keep=1.0).plan(patches, tower)) == {patches}


@pytest.mark.parametrize(
    ("method", "left"),
    [
        (PiToMe(ratio=0.9), 54),
        (PiToMe(ratio=0.95), 183),
        (PiToMe(ratio=0.975), 330),
        (CrossGET(r=13), 277),
        (MCTF(r=16), 224),
    ],
    ids=str,
)
def test_the_papers_own_parameters_leave_as_many_as_officially(method, left):
    assert method.plan(576, CLIP_L)[-1] == left


def test_fast_mctf_and_the_floor_of_its_tokens():
    deit = TowerFacts(layers=12, feature_layer=11, has_cls=True)
    assert MCTF(r=0.35, layers=(3, 6, 9)).plan(196, deit)[-1] == 55
    assert min(MCTF(r=100).plan(196, deit)) >= 9


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: PiToMe(keep=0.5, ratio=0.9), ParameterError, "give one"),
        (lambda: PiToMe(ratio=0.4), ParameterError, "ratio=0.4"),
        (lambda: PiToMe(schedule="llama"), UnknownNameError, "Did you mean 'llava'"),
        (lambda: CrossGET(keep=0.5, r=3), ParameterError, "give one"),
        (lambda: MCTF(mode="precis"), UnknownNameError, "Did you mean 'precise'"),
        (lambda: MCTF(layers=()), ParameterError, "0-based blocks"),
        (lambda: MCTF(layers=(3, 40), keep=0.5).plan(576, CLIP_L), ParameterError, "nearest: 22"),
        (lambda: MCTF(keep=0.5, layers=(20,), output="full").plan(576, CLIP_L), BudgetError, "nearest: keep=0.9"),
        (lambda: CrossGET(keep=1, output="merged").plan(576, TowerFacts(4, 2, True)), BudgetError, "nearest: keep=72"),
        (lambda: ZeroTPrune(retention=(0.5,)), ParameterError, "one share for each"),
        (lambda: ZeroTPrune(variance=(0.5, 0.1)), ParameterError, r"variance\[1\]=0.1"),
        (lambda: TokenTransforming(mode="row", targets_a_token=3), ParameterError, "mode='mass'"),
        (lambda: Expedite(keep=0.5, clusters=(3, 3)), ParameterError, "give one"),
        (lambda: Expedite(keep=0.3, output="merged").plan(576, CLIP_L), BudgetError, "173 clusters"),
        (lambda: Expedite(clusters=(30, 3)).plan(576, CLIP_L), ParameterError, r"nearest: \(24, 3\)"),
        (lambda: Expedite(window=4), ParameterError, "odd"),
    ],
)
def test_what_cannot_be_done_names_what_can(make, error, message):
    with pytest.raises(error, match=message):
        make()
