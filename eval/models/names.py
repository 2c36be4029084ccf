"""What `--model` can name: a shipped model, a local folder or a hub name."""

from __future__ import annotations

import json
import os
from pathlib import Path

from vlmprune.errors import VlmpruneError, unknown

CHECKPOINTS = Path(__file__).parents[1] / "checkpoints"


class ModelLoadError(VlmpruneError, OSError):
    """A model folder or hub name cannot be loaded."""


def shipped_models() -> list[str]:
    """Names of the trained models that come with vlmprune."""
    return sorted(folder.parent.name for folder in CHECKPOINTS.glob("*/config.json"))


def resolve_model(name: str) -> str:
    """Folder of a shipped model or local folder (absolute), or the hub name as it is.

    Raises:
        UnknownNameError: the name is none of them.
        ModelLoadError: the folder has no readable `config.json`.
    """
    if name in shipped_models():
        return str(CHECKPOINTS / name)
    path = Path(name).expanduser()
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1 or name.endswith(os.sep):
        check_folder(path)
        return str(path.resolve())
    if name.count("/") == 1:
        return name
    raise unknown(
        "model (a shipped name, a local folder or a hub name like 'llava-hf/llava-1.5-7b-hf')", name, shipped_models()
    )


def check_folder(path: Path) -> None:
    """Raise `ModelLoadError` unless `path` is a folder with a readable `config.json` and weights."""
    if not path.is_dir():
        raise ModelLoadError(f"Model folder {str(path)!r} does not exist or is no folder.")
    try:
        config = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ModelLoadError(f"Model folder {str(path)!r} holds no config.json.") from None
    except (OSError, ValueError) as error:
        raise ModelLoadError(f"config.json of model folder {str(path)!r} cannot be read: {error}") from error
    if not isinstance(config, dict) or "model_type" not in config:
        raise ModelLoadError(f"config.json of model folder {str(path)!r} names no model_type.")
    if not any(path.glob("*.safetensors")) and not any(path.glob("pytorch_model*.bin")):
        raise ModelLoadError(f"Model folder {str(path)!r} holds no weights (*.safetensors or pytorch_model*.bin).")
