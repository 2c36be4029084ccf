"""Analytic cost of one request of a vision-language model, from the token counts that each layer really saw.

Counts are multiply-accumulates (MACs) of matrix products, convolutions and attention products; FLOPs are twice that.
Attention is counted in full (not halved for causality), as fused kernels and
``torch.utils.flop_counter.FlopCounterMode`` count it. Norms, activations, softmax, rotary embeddings and the
selection itself are not counted.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedConfig

from vlmprune.errors import unknown

PLAIN_FFN_TYPES = frozenset(
    {
        "bloom",
        "codegen",
        "falcon",
        "gpt2",
        "gpt_bigcode",
        "gpt_neo",
        "gpt_neox",
        "gptj",
        "mpt",
        "opt",
        "phi",
        "starcoder2",
    }
)
"""Language model types whose feed-forward block has two matrices; all others are counted with a gate (three)."""


@dataclass(frozen=True)
class Cost:
    """MACs of one request by stage; ``flops`` are twice the MACs."""

    vision: int = 0
    projector: int = 0
    prefill: int = 0
    head: int = 0
    decode: int = 0

    @property
    def prefill_total(self) -> int:
        """MACs until the first token: tower, projector, language model, one row of the output head."""
        return self.vision + self.projector + self.prefill + self.head

    @property
    def total(self) -> int:
        """MACs of the whole request."""
        return self.prefill_total + self.decode

    def flops(self) -> dict[str, int]:
        """FLOPs by stage."""
        return {name: 2 * getattr(self, name) for name in ("vision", "projector", "prefill", "head", "decode")}


@dataclass(frozen=True)
class LanguageShape:
    """The sizes of a decoder-only language model that decide its cost."""

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    ffn_matrices: int
    vocab: int

    @classmethod
    def from_config(cls, config: PreTrainedConfig) -> LanguageShape:
        """Read the sizes from a model's configuration; composite ones are asked for their text part."""
        text = config.get_text_config()
        heads = text.num_attention_heads
        ffn = getattr(text, "intermediate_size", None) or getattr(text, "ffn_dim", None) or 4 * text.hidden_size
        return cls(
            layers=text.num_hidden_layers,
            hidden=text.hidden_size,
            heads=heads,
            kv_heads=getattr(text, "num_key_value_heads", None) or heads,
            head_dim=getattr(text, "head_dim", None) or text.hidden_size // heads,
            ffn=ffn,
            ffn_matrices=2 if text.model_type in PLAIN_FFN_TYPES else 3,
            vocab=text.vocab_size,
        )

    @property
    def weights_per_layer(self) -> int:
        """Elements of the matrices of one layer: the MACs that one token costs there besides attention products."""
        attention = 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)
        return attention + self.ffn_matrices * self.hidden * self.ffn

    def prefill_macs(self, tokens: Sequence[int]) -> int:
        """MACs of the decoder layers for ``tokens`` [layers], all tokens (visual and text) entering each layer."""
        self._check(tokens)
        return sum(n * self.weights_per_layer + 2 * n * n * self.heads * self.head_dim for n in tokens)

    def decode_macs(self, tokens: Sequence[int], steps: int) -> int:
        """MACs of ``steps`` single-token passes with output head, after a prefill that cached ``tokens`` [layers]."""
        self._check(tokens)
        keys = sum(steps * n + steps * (steps + 1) // 2 for n in tokens)
        fixed = steps * (self.layers * self.weights_per_layer + self.head_macs())
        return fixed + 2 * keys * self.heads * self.head_dim

    def head_macs(self, positions: int = 1) -> int:
        """MACs of the output head on ``positions`` tokens."""
        return positions * self.hidden * self.vocab

    def cache_bytes(self, tokens: Sequence[int], element_size: int) -> int:
        """Bytes of keys and values of one sequence with ``tokens`` [layers] in its cache."""
        self._check(tokens)
        return 2 * sum(tokens) * self.kv_heads * self.head_dim * element_size

    def _check(self, tokens: Sequence[int]) -> None:
        if len(tokens) != self.layers:
            raise ValueError(f"{len(tokens)} token counts given for a language model of {self.layers} layers")


@dataclass(frozen=True)
class VisionWork:
    """What the vision tower is given for one request.

    ``crops``: pictures of the tower's fixed size (tiles included). ``grids``: (frames, rows, columns) of patches of
    every picture, for towers that take pictures of any size.
    """

    crops: int = 0
    grids: tuple[tuple[int, int, int], ...] = ()


def _encoder_macs(tokens: int, layers: int, hidden: int, ffn: int) -> int:
    return layers * (tokens * (4 * hidden * hidden + 2 * hidden * ffn) + 2 * tokens * tokens * hidden)


def _pooling_head_macs(tokens: int, hidden: int, ffn: int) -> int:
    return 2 * hidden * hidden + 2 * tokens * hidden * hidden + 2 * tokens * hidden + 2 * hidden * ffn


def llava_vision_macs(config: PreTrainedConfig, work: VisionWork) -> tuple[int, int]:
    """MACs of a CLIP or SigLIP tower and of LLaVA's two-layer projector for ``work.crops`` pictures."""
    vision = config.vision_config
    hidden, ffn = vision.hidden_size, vision.intermediate_size
    patches = (vision.image_size // vision.patch_size) ** 2
    has_cls = vision.model_type.startswith("clip")
    tokens = patches + has_cls
    tower = patches * hidden * vision.num_channels * vision.patch_size**2
    tower += _encoder_macs(tokens, vision.num_hidden_layers, hidden, ffn)
    if vision.model_type.startswith("siglip") and getattr(vision, "vision_use_head", True):
        tower += _pooling_head_macs(tokens, hidden, ffn)
    layers = config.vision_feature_layer
    width = hidden * (1 if isinstance(layers, int) else len(layers))
    text = config.get_text_config().hidden_size
    projected = tokens - (config.vision_feature_select_strategy == "default")
    return work.crops * tower, work.crops * projected * (width * text + text * text)


def llava_work(config: PreTrainedConfig, inputs: Mapping[str, Any], images: Sequence[int]) -> list[VisionWork]:
    """One crop an image."""
    return [VisionWork(crops=count) for count in images]


@dataclass(frozen=True)
class VisionFamily:
    """How a model type looks at pictures.

    ``macs(config, work)`` gives (tower, projector) MACs. ``work(config, inputs, images)`` reads from the processor's
    ``inputs`` of a batch, with ``images`` pictures in each row, what every row gives the tower.
    """

    macs: Callable[[PreTrainedConfig, VisionWork], tuple[int, int]]
    work: Callable[[PreTrainedConfig, Mapping[str, Any], Sequence[int]], list[VisionWork]]


VISION_FAMILIES: dict[str, VisionFamily] = {"llava": VisionFamily(llava_vision_macs, llava_work)}
"""By ``config.model_type``."""


def request_cost(
    config: PreTrainedConfig, work: VisionWork, visual_tokens: Sequence[int], text_tokens: int, new_tokens: int = 0
) -> Cost:
    """Cost of one request.

    ``visual_tokens`` [layers of the language model] are the visual tokens each layer saw, ``text_tokens`` all other
    prompt tokens, ``new_tokens`` the generated ones (the first comes from the prefill). Raises ``UnknownNameError``
    for a model type without a vision function.
    """
    if config.model_type not in VISION_FAMILIES:
        raise unknown("model type", config.model_type, VISION_FAMILIES)
    vision, projector = VISION_FAMILIES[config.model_type].macs(config, work)
    shape = LanguageShape.from_config(config)
    tokens = [n + text_tokens for n in visual_tokens]
    return Cost(
        vision=vision,
        projector=projector,
        prefill=shape.prefill_macs(tokens),
        head=shape.head_macs(),
        decode=shape.decode_macs(tokens, max(0, new_tokens - 1)),
    )


def equivalent_tokens(visual_tokens: Sequence[int]) -> float:
    """Visual tokens averaged over layers, which compares methods that drop inside the LLM with those before it."""
    return sum(visual_tokens) / len(visual_tokens)


def fastv_formula(tokens: Sequence[int], hidden: int, ffn: int) -> int:
    """FastV's "FLOPs" (arXiv 2403.06764): ``4nd^2 + 2n^2d + 2ndm`` a layer. They are MACs, without a gate."""
    return sum(4 * n * hidden**2 + 2 * n * n * hidden + 2 * n * hidden * ffn for n in tokens)


def pyramiddrop_formula(tokens: Sequence[int], hidden: int, ffn: int) -> int:
    """PyramidDrop's "FLOPs" (arXiv 2410.17247): ``4nd^2 + 2n^2d + 3ndm`` a layer. They are MACs, with a gate."""
    return sum(4 * n * hidden**2 + 2 * n * n * hidden + 3 * n * hidden * ffn for n in tokens)
