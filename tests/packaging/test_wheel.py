"""The wheel holds one top-level package, and the folders of the repository shadow nothing."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Answers to every name that transformers imports from the public package, as decorator, class and namespace.
STAND_IN = """
class _Names(type):
    def __getattr__(cls, name):
        return cls


class _Anything(metaclass=_Names):
    def __init__(self, *args, **kwargs):
        pass

    def __call__(self, decorated=None, *args, **kwargs):
        return decorated


def __getattr__(name):
    if name.startswith("__"):
        raise AttributeError(name)
    return _Anything
"""
TRAINING = "vlmprune/eval/training/"
PARTS = ("pyproject.toml", "README.md", "LICENSE", "vlmprune", "kernels", "patches", "eval")


def run(code, cwd, *path):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("wheel")
    for part in PARTS:
        path = ROOT / part
        copy = shutil.copytree if path.is_dir() else shutil.copy
        options = {"ignore": shutil.ignore_patterns("__pycache__")} if path.is_dir() else {}
        copy(path, source / part, **options)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        target,
        source,
    ]
    subprocess.run(command, check=True, capture_output=True)
    return next(target.glob("*.whl")), source


def test_wheel_has_one_top_level_package(wheel):
    wheel, source = wheel
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"vlmprune"}
    packaged = {name for name in names if name.endswith(".py")}
    for folder in ("vlmprune", "kernels", "patches", "eval"):
        prefix = "" if folder == "vlmprune" else "vlmprune/"
        expected = {f"{prefix}{path.relative_to(source).as_posix()}" for path in (source / folder).rglob("*.py")}
        expected = {name for name in expected if not name.startswith(TRAINING)}
        assert expected <= packaged, sorted(expected - packaged)
    assert not [name for name in names if name.startswith(TRAINING)]
    data = (
        "py.typed",
        "eval/checkpoints/tiny-llava/model.safetensors",
        "eval/checkpoints/tiny-llava/text_tower/model.safetensors",
        "eval/tasks/data/scenes.parquet",
        "eval/models/presets/llava-1.5-7b.json",
    )
    assert {f"vlmprune/{name}" for name in data} <= set(names)


def test_wheel_works_away_from_the_repository(wheel, tmp_path):
    site = tmp_path / "site"
    zipfile.ZipFile(wheel[0]).extractall(site)
    code = """
import importlib.util, vlmprune
from vlmprune.kernels.segmented_topk import segmented_topk
from vlmprune.patches.engine import PruningEngine
for name in ("kernels", "patches", "eval"):
    assert importlib.util.find_spec(name) is None, name
print(vlmprune.__file__)
print(vlmprune.list_methods()[0])
"""
    out = run(code, tmp_path, site).splitlines()
    assert out == [str(site / "vlmprune" / "__init__.py"), "random"]


def test_public_kernels_package_is_not_shadowed(tmp_path):
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text(STAND_IN)
    info = tmp_path / "kernels-0.18.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    code = """
import kernels, transformers
from transformers import LlavaForConditionalGeneration
import vlmprune.kernels.segmented_topk as ours
print(kernels.__file__)
print(ours.__file__)
"""
    out = run(code, ROOT, tmp_path).splitlines()
    assert out == [str(package / "__init__.py"), str(ROOT / "kernels" / "segmented_topk.py")]


def test_import_is_light_and_has_no_side_effects(tmp_path):
    code = """
import sys, vlmprune
assert "torch" not in sys.modules
vlmprune.apply
heavy = {"lmms_eval", "matplotlib", "datasets"} & set(sys.modules)
assert not heavy, heavy
import torch, transformers
before = torch.backends.cuda.flash_sdp_enabled(), torch.get_num_threads(), torch.is_grad_enabled()
from vlmprune.patches.engine import PruningEngine
assert before == (torch.backends.cuda.flash_sdp_enabled(), torch.get_num_threads(), torch.is_grad_enabled())
"""
    run(code, tmp_path)
