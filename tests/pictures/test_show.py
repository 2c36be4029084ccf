"""`vlmprune show`: from files to a picture file."""

import pytest
from PIL import Image
from typer.testing import CliRunner

from support.families.real_processors import photograph
from vlmprune import cli

runner = CliRunner()


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    path = tmp_path_factory.mktemp("photos") / "coffee.jpg"
    Image.fromarray(photograph("coffee")).save(path)
    return path


def show(*arguments):
    return runner.invoke(cli.app, ["show", "--new-tokens", "2", *map(str, arguments)])


def test_a_picture_is_written(photo, tmp_path):
    out = tmp_path / "kept.png"
    result = show(
        photo,
        photo,
        "--model",
        "tiny-qwen2.5-vl",
        "--methods",
        "fastervlm,fastv",
        "--keep",
        "0.5",
        "--scores",
        "--out",
        out,
    )
    assert result.exit_code == 0, result.output
    with Image.open(out) as picture:
        assert picture.width > 3 * 400


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"photo": "no/such.png"}, "'no/such.png' does not exist"),
        ({"--out": "kept.docx"}, "allowed: .jpg, .pdf, .png, .svg"),
        ({"--out": "no/folder/kept.png"}, "'no/folder' does not exist"),
        ({"--methods": "divprun"}, "Did you mean 'divprune'"),
    ],
)
def test_mistakes_are_told_before_the_model_is_loaded(photo, tmp_path, changes, message):
    options = {"--model": "no-such-model", "--methods": "divprune", "--out": tmp_path / "kept.png"}
    shown = changes.pop("photo", photo)
    result = show(shown, *(part for item in {**options, **changes}.items() for part in item))
    assert result.exit_code == 2
    assert message in " ".join(result.output.split())


def test_a_file_that_is_no_picture(tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"\xff\xd8 not a picture")
    result = show(broken, "--model", "tiny-llava", "--out", tmp_path / "kept.png")
    assert result.exit_code == 2
    assert "is no picture that can be read" in " ".join(result.output.split())
