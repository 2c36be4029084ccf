"""What the plug-in does not serve, each with the reason; a server that asks for it does not start."""

from __future__ import annotations

from typing import Any

from vlmprune.errors import UnsupportedCallError, UnsupportedMethodError
from vlmprune.methods.base import Method
from vlmprune.methods.input_method import InputMethod
from vlmprune.methods.needs import FIRST_LAYER, INSTRUCTION, PIXELS, VIDEOS, Need, ordered
from vlmprune.methods.registry import known_methods

from ..families.family import Family

REASONS: dict[Need, str] = {
    INSTRUCTION: "vLLM encodes an image once for all prompts that show it, so the text beside it is not known then",
    FIRST_LAYER: "vLLM encodes an image once for all prompts that show it, before the first decoder layer runs",
    PIXELS: "how many tokens stay is not known from the size of an image, and vLLM asks for it before it encodes",
    VIDEOS: "it chooses among the frames of videos, and the plug-in serves images",
}
"""Needs that nothing in vLLM meets."""


def check_method(method: Method) -> InputMethod:
    """Return a method whose kind can be served.

    Raises:
        UnsupportedMethodError: it acts elsewhere than before the first layer, needs what vLLM cannot give, or how many tokens
            it keeps is not known from the size of an image.
    """
    reason = _reason(method)
    if reason is not None:
        raise UnsupportedMethodError(
            f"{method.name!r} cannot be served by vLLM: {reason}. Served: {', '.join(served())}."
        )
    assert isinstance(method, InputMethod)
    return method


def served() -> list[str]:
    """Return the names of the methods that can be served, some of them only with some models."""
    return [name for name, cls in known_methods().items() if _reason_by_class(cls) is None]


def check_family(method: InputMethod, family: Family) -> None:
    """Raise UnsupportedMethodError unless a model family meets the needs of a method in vLLM."""
    for need in ordered(method.needs):
        if not need.met_by(family):
            raise UnsupportedMethodError(
                f"{method.name!r} needs {need.sentence}, which {family.name} models do not give in vLLM. Methods that ask for "
                "nothing: random, uniform, divprune."
            )


def check_engine(config: Any, *, reads_tower: bool, mrope: bool) -> None:
    """Raise UnsupportedCallError for settings of an engine under which hooks would be bypassed, or ranks differ.

    Args:
        config: the engine's `VllmConfig`.
        reads_tower: whether the method reads layers of the vision tower.
        mrope: whether the model's positions are 3-D.
    """
    compilation, parallel = config.compilation_config, config.parallel_config
    multimodal = config.model_config.multimodal_config
    for name in ("compile_mm_encoder", "cudagraph_mm_encoder"):
        if getattr(compilation, name):
            raise UnsupportedCallError(
                f"{name} runs the vision tower without the hooks that pruning relies on; allowed: {name}=False."
            )
    if reads_tower and parallel.tensor_parallel_size > 1:
        raise UnsupportedCallError(
            f"tensor_parallel_size={parallel.tensor_parallel_size} shares the vision tower among ranks, none of which sees the "
            "attention that the method scores by; allowed: methods that read no tower (divprune, uniform, random), or one rank."
        )
    if mrope and parallel.pipeline_parallel_size > 1:
        raise UnsupportedCallError(
            f"pipeline_parallel_size={parallel.pipeline_parallel_size}: only the first stage knows which tokens of an image "
            "were kept, and all stages rotate by their places; allowed: pipeline_parallel_size=1, or a LLaVA model."
        )
    if mrope and "FULL" in (mode := compilation.cudagraph_mode.name) and mode not in _DECODE_GRAPHS:
        raise UnsupportedCallError(
            f"cudagraph_mode={mode} replays prefills without the places of kept tokens; allowed: {', '.join(_DECODE_GRAPHS)}, "
            "PIECEWISE, NONE."
        )
    if getattr(parallel, "use_ubatching", False) or getattr(parallel, "enable_dbo", False):
        raise UnsupportedCallError(
            "enable_dbo cuts a batch in two after its images were placed; allowed: enable_dbo=False."
        )
    if config.speculative_config is not None and mrope:
        raise UnsupportedCallError(
            "A draft model gets the images of a Qwen-VL model without the places of kept tokens; allowed: no speculative_config."
        )
    if getattr(multimodal, "video_pruning_rate", None):
        raise UnsupportedCallError(
            f"video_pruning_rate={multimodal.video_pruning_rate} is vLLM's own pruning; allowed: one of the two."
        )


_DECODE_GRAPHS = ("FULL_AND_PIECEWISE", "FULL_DECODE_ONLY")


def _reason(method: Method) -> str | None:
    sites = [part.site for part in method.parts()]
    if getattr(method, "keep_positions", False):
        return "keep_positions=True asks where an image stands in its prompt, and vLLM encodes it once for all prompts"
    reason = _reason_of_sites(sites) or _reason_of_needs(method)
    if reason is None and isinstance(method, InputMethod) and method.kept_count(4, (2, 2)) is None:
        return "the image decides how many tokens stay, and vLLM asks for it before it encodes; give it a keep"
    return reason


def _reason_by_class(cls: type[Method]) -> str | None:
    try:
        method = cls(keep=0.5)
    except ValueError:
        # Methods whose budget is set by other parameters act inside the language model.
        return _reason_of_sites([cls.site])
    return _reason(method)


def _reason_of_needs(method: Method) -> str | None:
    return next((REASONS[need] for need in ordered(method.needs) if need in REASONS), None)


def _reason_of_sites(sites: list[Any]) -> str | None:
    if "encoder" in sites:
        return "it acts in the blocks of the vision tower, which are vLLM's own"
    if "layer" in sites or "attention" in sites:
        return "it acts inside the language model, where all layers of a request share the blocks of vLLM's cache"
    return None
