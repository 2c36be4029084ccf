"""A family in a package of its own, as the documentation writes it: found by its entry point, refused where it cannot be."""

from __future__ import annotations

import re

from support.other_package import ROOT, install, named_points, run

GROUP = "vlmprune.families"
RECIPE = (ROOT / "docs" / "adding_a_family.md").read_text()

# A model of transformers' modules, of a class that transformers has not.
MODEL = """
import warnings, torch, vlmprune
from support.general.host_case import build
case = build("LlavaForConditionalGeneration")
cls = type(case.model)
facts = {key: value for key, value in vars(cls).items() if key not in ("__dict__", "__weakref__")}
case.model.__class__ = type("NAME", cls.__bases__, {**facts, "__module__": "someone.modeling"})
"""


def test_the_recipe_serves_the_class(tmp_path):
    (tmp_path / "vlmprune_someone").mkdir()
    code = re.search(r"```python\n(.*?)```", RECIPE, re.DOTALL)
    (tmp_path / "vlmprune_someone" / "family.py").write_text(code[1])
    install(tmp_path, "vlmprune-someone", GROUP, named_points(RECIPE, GROUP))
    program = (
        MODEL.replace("NAME", "SomeonesVLM")
        + """
with torch.no_grad(), vlmprune.pruned(case.model, "divprune", keep=0.5):
    case.model(**case.inputs([[3, "A", 4]]))
    print(vlmprune.last_run(case.model).images[0].kept.numel(), case.tokens("A"))
print(vlmprune.explain(case.model))
"""
    )
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    first, *explained = done.stdout.splitlines()
    kept, total = map(int, first.split())
    assert kept == total // 2, done.stdout + done.stderr
    assert "Someone's" in "\n".join(explained)


def test_one_that_cannot_be_served_is_warned_about_and_left_out(tmp_path):
    points = (
        "Gone = no_such_module:Family\nOther = vlmprune.patches.families.llava:Llava\nNone = json:JSONDecoder\n"
        "LlavaForConditionalGeneration = vlmprune.patches.families.llava:Llava"
    )
    install(tmp_path, "broken", GROUP, points)
    program = (
        MODEL.replace("NAME", "LlavaForConditionalGeneration")
        + """
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    try:
        vlmprune.apply(case.model, "divprune", keep=0.5)
    except vlmprune.errors.UnsupportedFamilyError as error:
        print("refused")
print(*sorted(str(each.message) for each in caught), sep="\\n")
"""
    )
    done = run(tmp_path, "-c", program)
    assert done.returncode == 0, done.stderr
    first, *said = done.stdout.splitlines()
    assert first == "refused", done.stdout + done.stderr
    expected = ("No module named", "vlmprune serves the class", "is no family", "do not name that class")
    assert len(said) == len(expected), said
    for line, words in zip(said, expected, strict=True):
        assert line.startswith("The package broken offers the family of "), line
        assert words in line
