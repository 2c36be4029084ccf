"""A method in a package of its own: scaffolded, installed, listed, measured, under contract; the engine untouched."""

from __future__ import annotations

import re

import pytest
from typer.testing import CliRunner

from support.other_package import ROOT, install, named_points, run
from vlmprune import cli
from vlmprune.new_method.scaffold import SITES, template

GROUP = "vlmprune.methods"
runner = CliRunner()


@pytest.fixture(scope="module", params=SITES)
def package(request, tmp_path_factory):
    """The folder of a scaffolded package, installed as `pip install -e` leaves it: metadata on the path."""
    name = f"longest_{request.param}"
    folder = tmp_path_factory.mktemp("packages")
    result = runner.invoke(cli.app, ["new-method", name, "--site", request.param, "--folder", str(folder)])
    assert result.exit_code == 0, result.output
    root = folder / f"vlmprune-longest-{request.param}"
    install(root, root.name, GROUP, named_points((root / "pyproject.toml").read_text(), GROUP))
    return name, root


def test_it_is_listed_and_its_own_tests_pass(package):
    name, root = package
    listed = run(root, "-m", "vlmprune", "methods")
    assert re.search(rf"^{name} .*visual tokens", listed.stdout, re.MULTILINE), listed.stdout + listed.stderr
    done = run(root, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(root / "tests"))
    assert "3 passed" in done.stdout, done.stdout


def test_it_is_under_contract(package):
    name, root = package
    tests = [f"tests/contracts/test_{part}.py" for part in ("oracle", "identity", "batch_equals_singles", "cache")]
    done = run(root, "-m", "pytest", "-p", "no:cacheprovider", "-k", f"{name} and llava-clip and not bf16", *tests)
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed, done.stdout
    assert int(passed[1]) >= 4, done.stdout
    assert "failed" not in done.stdout, done.stdout


def test_it_is_measured(package, tmp_path):
    name, root = package
    pytest.importorskip("lmms_eval")
    out = tmp_path / "results"
    command = ["-m", "vlmprune", "bench", "--model", "tiny-llava", "--methods", name, "--keep", "0.6", "--no-baselines"]
    done = run(
        root, *command, "--tasks", "scenes_existence", "--limit", "2", "--timing-seconds", "0", "--out", str(out)
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert name in (out / "results.csv").read_text()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["divprune"], "There is a method 'divprune' already"),
        (["My-Method"], "lower-case words"),
        (["mine", "--site", "encoder"], "Allowed: input, layer"),
    ],
)
def test_mistakes(arguments, message, tmp_path):
    result = runner.invoke(cli.app, ["new-method", *arguments, "--folder", str(tmp_path)])
    assert result.exit_code == 2
    assert message in result.output
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten(tmp_path):
    first = runner.invoke(cli.app, ["new-method", "mine", "--folder", str(tmp_path)])
    again = runner.invoke(cli.app, ["new-method", "mine", "--folder", str(tmp_path)])
    assert (first.exit_code, again.exit_code) == (0, 2)
    assert "nothing is overwritten" in again.output


def test_a_package_that_cannot_be_loaded_breaks_its_own_method_alone(tmp_path):
    install(tmp_path, "broken", GROUP, "gone = no_such_module:Gone\ndivprune = vlmprune.methods:FastV")
    program = (
        "import warnings, vlmprune\n"
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always')\n"
        "    names = vlmprune.list_methods()\n"
        "print(len(caught), 'gone' in names, vlmprune.methods.registry.get_method('divprune').__name__)\n"
        "try:\n"
        "    vlmprune.methods.registry.get_method('gone')\n"
        "except vlmprune.errors.ParameterError as error:\n"
        "    print(error)\n"
    )
    done = run(tmp_path, "-c", program)
    first, second = done.stdout.splitlines()
    assert first == "2 False DivPrune", done.stdout + done.stderr
    assert second.startswith("The package broken offers the method 'gone', which cannot be loaded: No module named")


@pytest.mark.parametrize("site", SITES)
def test_the_recipe_shows_the_template(site):
    recipe = (ROOT / "docs" / "adding_a_method.md").read_text()
    shown = template(f"{site}.py.txt").replace("$class_name", "LongestFeatures").replace("$name", "longest_features")
    assert f"```python\n{shown}```" in recipe
