"""The names that `vlmprune` offers, and that importing it is light."""

import subprocess
import sys

import pytest

import vlmprune
from vlmprune.methods.registry import METHODS


def test_every_method_is_reachable_from_both_places():
    for cls in METHODS.values():
        assert getattr(vlmprune, cls.__name__) is cls
        assert getattr(vlmprune.methods, cls.__name__) is cls
    assert {cls.__name__ for cls in METHODS.values()} <= set(dir(vlmprune)) & set(dir(vlmprune.methods))
    assert vlmprune.InputMethod is vlmprune.methods.InputMethod


def test_importing_is_light():
    code = "import sys, vlmprune; vlmprune.__version__; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False"]


def test_unknown_names_are_answered_with_the_nearest():
    with pytest.raises(AttributeError, match="Did you mean 'PyramidDrop'"):
        vlmprune.PyramidDrp  # noqa: B018
    with pytest.raises(AttributeError, match="Did you mean 'apply'"):
        vlmprune.aply  # noqa: B018
