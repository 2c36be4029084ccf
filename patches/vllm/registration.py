"""The entry point that vLLM calls in each of its processes."""

from __future__ import annotations

from typing import Any

from vlmprune.errors import UnsupportedFamilyError

from .served_models import SERVED_MODELS
from .settings import read_setting
from .versions import check_version, installed_version, is_tested

_MARK = "_vlmprune_checks"


def register() -> None:
    """Make the model classes known that prune; without the setting they are vLLM's own.

    A model with the setting that no such class serves is refused when its configuration is read, as is a vLLM that was not
    tested.
    """
    from vllm import ModelRegistry

    release = installed_version()
    if is_tested(release):
        for architecture, served in SERVED_MODELS.items():
            ModelRegistry.register_model(architecture, served.model_class)
    _check_when_inspected(ModelRegistry, release)


def check_setting(architecture: str, config: Any, release: str | None) -> None:
    """Raise unless a model's setting, if it has one, can be served; nothing is raised for a model without it.

    Args:
        architecture: the class by which vLLM serves the model.
        config: its configuration.
        release: the version of vLLM.

    Raises:
        UnsupportedCallError: a version that was not tested.
        UnsupportedFamilyError: a model that is not served.
        ValueError: one of vlmprune's errors about the method.
    """
    if getattr(config, "vlmprune", None) is None:
        return
    check_version(release)
    setting = read_setting(config)
    assert setting is not None
    if architecture not in SERVED_MODELS:
        raise UnsupportedFamilyError(
            f"{architecture} is not served with pruning by vLLM; served: {', '.join(SERVED_MODELS)}."
        )
    SERVED_MODELS[architecture].check(setting.method, config)


def _check_when_inspected(registry: Any, release: str | None) -> None:
    """Have the registry check the setting of every model whose class it looks up, which it does before anything is loaded."""
    inspect = registry.inspect_model_cls
    if getattr(inspect, _MARK, False):
        return

    def checked(architectures: Any, model_config: Any) -> Any:
        info, architecture = inspect(architectures, model_config)
        check_setting(architecture, model_config.hf_config, release)
        return info, architecture

    setattr(checked, _MARK, True)
    # On the one instance that vLLM has; classes stay as they are.
    registry.inspect_model_cls = checked
