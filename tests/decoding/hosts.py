"""The caches and wrappers that a pruned model meets."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from tempfile import TemporaryDirectory
from typing import Any

import torch

Wrapper = Callable[[Any], Any]

CACHES: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "none": {"use_cache": False},
    "static": {"cache_implementation": "static"},
    "offloaded": {"cache_implementation": "offloaded"},
    "offloaded static": {"cache_implementation": "offloaded_static"},
    "quantized (fp8)": {"cache_implementation": "quantized", "cache_config": {"backend": "fp8"}},
}


@contextmanager
def plain(model: Any) -> Iterator[Any]:
    """The model itself."""
    yield model


@contextmanager
def peft(model: Any) -> Iterator[Any]:
    """A `PeftModel` with LoRA weights that change nothing yet."""
    from peft import LoraConfig, get_peft_model

    wrapped = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q_proj|v_proj)"))
    yield wrapped.eval()


@contextmanager
def distributed(model: Any) -> Iterator[Any]:
    """`DistributedDataParallel` in a group of one process."""
    with TemporaryDirectory() as folder:
        torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/group", rank=0, world_size=1)
        try:
            yield torch.nn.parallel.DistributedDataParallel(model)
        finally:
            torch.distributed.destroy_process_group()


@contextmanager
def data_parallel(model: Any) -> Iterator[Any]:
    """`DataParallel`, which on a CPU calls the module itself."""
    yield torch.nn.DataParallel(model)


@contextmanager
def compiled(model: Any) -> Iterator[Any]:
    """`torch.compile(model)`; the backend runs the graphs as they are."""
    torch._dynamo.reset()
    yield torch.compile(model, backend="eager")
    torch._dynamo.reset()


@contextmanager
def compiled_forward(model: Any) -> Iterator[Any]:
    """`model.forward = torch.compile(model.forward)`, which `generate` calls too."""
    torch._dynamo.reset()
    model.forward = torch.compile(model.forward, backend="eager")
    yield model
    torch._dynamo.reset()


@contextmanager
def accelerated(model: Any) -> Iterator[Any]:
    """`accelerate.dispatch_model` with the weights of a part on the disk."""
    from accelerate import dispatch_model

    with TemporaryDirectory() as folder:
        parts = {name: "cpu" for name, _ in model.named_children()}
        parts.pop("model")
        parts.update({f"model.{name}": "cpu" for name, _ in model.model.named_children()})
        parts["model.language_model"] = "disk"
        yield dispatch_model(model, parts, main_device="cpu", offload_dir=folder)


WRAPPERS: dict[str, Any] = {
    "none": plain,
    "`PeftModel`": peft,
    "`DistributedDataParallel`": distributed,
    "`DataParallel`": data_parallel,
    "`torch.compile`": compiled,
    "compiled `forward`": compiled_forward,
    "accelerate, on disk": accelerated,
}


def fresh(model: Any) -> Any:
    """Return a copy that a wrapper may change."""
    return copy.deepcopy(model)
