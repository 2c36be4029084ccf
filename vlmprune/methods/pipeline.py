"""Methods at different sites that run one after the other in the same prefill."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..errors import UnsupportedMethodError
from .base import Method
from .layer_method import LayerMethod


@dataclass(frozen=True)
class Pipeline:
    """At most one method at each site.

    Attributes:
        methods: what the user asked for, in the order given.
        at_input: the method that selects before the first layer, or None.
        at_layers: the method that drops inside the language model, or None.
    """

    methods: tuple[Method, ...]
    at_input: Method | None
    at_layers: LayerMethod | None

    @property
    def name(self) -> str:
        """Names of the methods, joined by "+"."""
        return "+".join(method.name for method in self.methods)

    def __repr__(self) -> str:
        return repr(self.methods[0]) if len(self.methods) == 1 else f"[{', '.join(map(repr, self.methods))}]"


def make_pipeline(methods: Sequence[Method]) -> Pipeline:
    """Sort the stages of `methods` by site.

    Raises:
        UnsupportedMethodError: no method, or two at the same site.
    """
    if not methods:
        raise UnsupportedMethodError("An empty list of methods; allowed: one per site (input, layer).")
    sites: dict[str, Method] = {}
    for method in methods:
        for part in method.parts():
            other = sites.setdefault(part.site, part)
            if other is not part:
                raise UnsupportedMethodError(
                    f"{part.name!r} and {other.name!r} both act at the {part.site} site; allowed: one per site "
                    "(input, layer)."
                )
    at_layers = sites.get("layer")
    assert at_layers is None or isinstance(at_layers, LayerMethod)
    return Pipeline(tuple(methods), sites.get("input"), at_layers)


def check_serves_videos(pipeline: Pipeline) -> None:
    """Raise UnsupportedMethodError unless every stage selects among the tokens of videos."""
    from .registry import METHODS

    for method in pipeline.methods:
        for part in method.parts():
            if not part.videos:
                served = ", ".join(name for name, cls in METHODS.items() if cls.videos)
                raise UnsupportedMethodError(
                    f"{part.name!r} does not serve videos, and this call holds one. Methods that do: {served}."
                )
