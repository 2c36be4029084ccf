"""The command line: quick help, one clear message and exit code 2 for what the user got wrong."""

from __future__ import annotations

import subprocess
import sys

import pytest
from typer.testing import CliRunner

import vlmprune
from vlmprune import cli

runner = CliRunner()


def run(*arguments: str):
    return runner.invoke(cli.app, list(arguments))


def test_help_and_version_import_nothing_heavy():
    program = (
        "import sys\n"
        "from vlmprune import cli\n"
        "for arguments in (['--help'], ['--version'], ['bench', '--help']):\n"
        "    try:\n"
        "        cli.app(arguments)\n"
        "    except SystemExit as leave:\n"
        "        assert not leave.code, leave.code\n"
        "heavy = {'torch', 'transformers', 'lmms_eval', 'datasets', 'numpy', 'matplotlib'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr
    assert f"vlmprune {vlmprune.__version__}" in done.stdout


def test_module_is_runnable():
    done = subprocess.run([sys.executable, "-m", "vlmprune", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, f"vlmprune {vlmprune.__version__}")


def test_methods_are_listed():
    result = run("methods")
    assert result.exit_code == 0
    assert [line.split()[0] for line in result.stdout.splitlines()] == vlmprune.list_methods()
    assert "seed=0" in result.stdout


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"--methods": "divprun"}, "Did you mean 'divprune'"),
        ({"--methods": "random:sed=1"}, "Did you mean 'seed'"),
        ({"--keep": "1.5"}, "keep=1.5"),
        ({"--keep": "0"}, "keep=0"),
        ({"--keep": "lots"}, "'lots' is no number"),
        ({"--model": "tiny-lava"}, "tiny-lava"),
        ({"--model": "./no/such/folder"}, "does not exist"),
        ({"--dtype": "float33"}, "Did you mean 'float32'"),
        ({"--device": "cuda:99"}, "cuda:99"),
        ({"--limit": "0.5"}, "--limit"),
        ({"--limit": "0"}, "--limit"),
        ({"--batch-size": "0"}, "--batch-size"),
        ({"--seed": "-1"}, "--seed"),
    ],
)
def test_what_the_user_got_wrong_is_one_clear_message(tmp_path, changes, message):
    pytest.importorskip("lmms_eval")
    options = {"--model": "./no/such/folder", "--methods": "pool", "--out": str(tmp_path / "out"), **changes}
    result = run("bench", *(part for pair in options.items() for part in pair))
    assert result.exit_code == 2
    assert message in " ".join(result.output.replace("│", " ").split())
    assert "Traceback" not in result.output
    assert not (tmp_path / "out").exists()


def test_missing_extra_is_named(tmp_path, monkeypatch):
    real = cli.find_spec
    monkeypatch.setattr(cli, "find_spec", lambda name: None if name == "lmms_eval" else real(name))
    result = run("bench", "--model", "tiny-llava", "--out", str(tmp_path / "out"))
    assert result.exit_code == 2
    assert "pip install 'vlmprune[eval]'" in result.output


def test_interruption_says_that_the_run_goes_on(tmp_path, monkeypatch):
    bench = pytest.importorskip("vlmprune.eval.bench")

    def interrupted(options):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "run_bench", interrupted)
    result = run("bench", "--model", "tiny-llava", "--out", str(tmp_path / "out"))
    assert result.exit_code == 130
    assert "the same command goes on" in result.output


def test_options_reach_the_benchmark(tmp_path, monkeypatch):
    bench = pytest.importorskip("vlmprune.eval.bench")
    seen = []
    monkeypatch.setattr(bench, "run_bench", seen.append)
    arguments = "--model m --methods pool,random:seed=3 --keep 0.5,64 --tasks a,b --limit 7 --batch-size 2 --seed 5"
    result = run("bench", *arguments.split(), "--no-baselines", "--out", str(tmp_path / "out"))
    assert result.exit_code == 0, result.output
    options = seen[0]
    assert options.methods == [("pool", {}), ("random", {"seed": 3})]
    assert (options.keeps, options.tasks, options.limit) == ([0.5, 64], ["a", "b"], 7)
    assert (options.batch_size, options.seed, options.baselines) == (2, 5, False)
