"""Methods at different sites that run one after the other in the same prefill."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from ..errors import ParameterError, UnsupportedMethodError, unknown
from .attention_method import AttentionMethod
from .base import Method
from .checks import check_flag
from .encoder_method import EncoderMethod
from .input_method import InputMethod
from .layer_method import LayerMethod
from .needs import GRID, PIXELS, TILES, WHOLE_TILES, FamilyFacts, ordered
from .pass_through import PassThrough


@dataclass(frozen=True)
class Pipeline:
    """At most one method at each site.

    Attributes:
        methods: what the user asked for, in the order given.
        at_encoder: the method that reduces in the vision tower, or None.
        at_input: the method that selects before the first layer; `PassThrough` where there is none.
        at_layers: the method that drops inside the language model, or None.
        at_attention: the method that changes attention inside the language model, or None.
    """

    methods: tuple[Method, ...]
    at_encoder: EncoderMethod | None
    at_input: InputMethod
    at_layers: LayerMethod | None
    at_attention: AttentionMethod | None = None

    @property
    def name(self) -> str:
        """Names of the methods, joined by "+"."""
        return "+".join(method.name for method in self.methods)

    def with_keep(self, keep: object) -> Pipeline:
        """Return the same methods with another budget.

        Args:
            keep: as for `apply`; for several methods a mapping from their names, those left out stay as they are.

        Raises:
            BudgetError: bad `keep`.
            ParameterError: a method's budget is set by another parameter, or one `keep` is given for several methods.
            UnknownNameError: a name in the mapping is none of the methods'.
        """
        names = [method.name for method in self.methods]
        if not isinstance(keep, Mapping):
            if len(names) > 1:
                example = ", ".join(f"{name!r}: ..." for name in names)
                raise ParameterError(f"keep={keep!r} for several methods; say which is meant: keep={{{example}}}.")
            keep = {names[0]: keep}
        for name in keep:
            if name not in names:
                raise unknown("method in keep", name, names)
        return make_pipeline(
            [
                replace(method, keep=keep[method.name]) if method.name in keep else method  # type: ignore[arg-type]
                for method in self.methods
            ]
        )

    def __repr__(self) -> str:
        return repr(self.methods[0]) if len(self.methods) == 1 else f"[{', '.join(map(repr, self.methods))}]"


def make_pipeline(methods: Sequence[Method]) -> Pipeline:
    """Sort the stages of `methods` by site.

    Raises:
        UnsupportedMethodError: no method, or two at the same site.
    """
    if not methods:
        raise UnsupportedMethodError(
            "An empty list of methods; allowed: one per site (encoder, input, layer, attention)."
        )
    sites: dict[str, Method] = {}
    for method in methods:
        for part in stages(method):
            other = sites.setdefault(part.site, part)
            if other is not part:
                raise UnsupportedMethodError(
                    f"{part.name!r} and {other.name!r} both act at the {part.site} site; allowed: one per site "
                    "(encoder, input, layer, attention)."
                )
    at_encoder, at_input, at_layers = sites.get("encoder"), sites.get("input"), sites.get("layer")
    at_attention = sites.get("attention")
    assert at_encoder is None or isinstance(at_encoder, EncoderMethod)
    if at_encoder is not None and at_encoder.output == "merged" and at_input is not None:
        for need in ordered(at_input.needs & {GRID, TILES, WHOLE_TILES}):
            raise UnsupportedMethodError(
                f"{at_input.name!r} needs {need.sentence}, and {at_encoder.name!r} with output='merged' leaves tokens without a "
                "grid; allowed: output='full' beside it."
            )
    if at_encoder is not None and at_input is not None and PIXELS in at_input.needs:
        raise UnsupportedMethodError(
            f"{at_input.name!r} drops patches before the vision tower, whose blocks {at_encoder.name!r} acts in; "
            "allowed: one of them."
        )
    at_input = at_input or PassThrough()
    assert isinstance(at_input, InputMethod)
    assert at_layers is None or isinstance(at_layers, LayerMethod)
    assert at_attention is None or isinstance(at_attention, AttentionMethod)
    return Pipeline(tuple(methods), at_encoder, at_input, at_layers, at_attention)


def stages(method: Method) -> tuple[Method, ...]:
    """Return the stages of a method; `keep_positions` holds for all of them.

    Raises:
        ParameterError: `keep_positions` of a method that cannot be asked for a part of its budget.
    """
    wanted = getattr(method, "keep_positions", False)
    check_flag("keep_positions", wanted)
    if not wanted:
        return method.parts()
    if getattr(method, "faithful", False):
        raise ParameterError(
            f"{method.name!r} with faithful=True keeps as many tokens as its official code, and keep_positions=True asks for a "
            "part of them; allowed: one of the two."
        )
    if PIXELS in method.needs:
        raise ParameterError(
            f"keep_positions=True: {method.name!r} chooses before the vision tower, which does not see the tokens that it "
            "drops; allowed: keep_positions=False."
        )
    return tuple(
        replace(part, keep_positions=True) if getattr(part, "keep_positions", None) is False else part  # type: ignore[call-arg]
        for part in method.parts()
    )


def check_call(part: Method, modalities: Collection[str], family: FamilyFacts) -> None:
    """Raise UnsupportedMethodError unless a call that holds `modalities` ("image", "video") meets the needs of a stage."""
    from .registry import known_methods

    held = sorted(set(modalities))
    for need in ordered(part.needs):
        if not need.met_by_call(held, family):
            refused = next((modality for modality in held if not need.met_by_call((modality,), family)), held[0])
            served = [
                name
                for name, cls in known_methods().items()
                if all(each.met_by(family) and each.met_by_call(held, family) for each in cls.needs)
            ]
            raise UnsupportedMethodError(
                f"{part.name!r} does not serve {refused}s, and this call holds one; it needs {need.sentence}. "
                f"Methods that do: {', '.join(served) or 'none'}."
            )
