"""Cost of a decoder-only language model from the number of tokens that each of its layers saw."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

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
class LanguageShape:
    """The sizes of a decoder-only language model that decide its cost.

    `ffn` is the width of a dense feed-forward block; `ffn_macs` [layers] what one token costs in that of each layer,
    which in a mixture of experts are the router and the experts that a token goes to.
    """

    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    ffn_macs: tuple[int, ...]
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
            ffn_macs=tuple(_ffn_macs(text, ffn, layer) for layer in range(text.num_hidden_layers)),
            vocab=text.vocab_size,
        )

    @property
    def attention_weights(self) -> int:
        """Elements of the four projections of one layer."""
        return 2 * self.hidden * self.head_dim * (self.heads + self.kv_heads)

    def prefill_macs(self, tokens: Sequence[int]) -> int:
        """MACs of the decoder layers for `tokens` [layers], all tokens (visual and text) entering each layer."""
        self._check(tokens)
        return sum(
            n * (self.attention_weights + ffn) + 2 * n * n * self.heads * self.head_dim
            for n, ffn in zip(tokens, self.ffn_macs, strict=True)
        )

    def decode_macs(self, tokens: Sequence[int], steps: int) -> int:
        """MACs of `steps` single-token passes with output head, after a prefill that cached `tokens` [layers]."""
        self._check(tokens)
        keys = sum(steps * n + steps * (steps + 1) // 2 for n in tokens)
        fixed = steps * (self.layers * self.attention_weights + sum(self.ffn_macs) + self.head_macs())
        return fixed + 2 * keys * self.heads * self.head_dim

    def head_macs(self, positions: int = 1) -> int:
        """MACs of the output head on `positions` tokens."""
        return positions * self.hidden * self.vocab

    def cache_bytes(self, tokens: Sequence[int], element_size: int) -> int:
        """Bytes of keys and values of one sequence with `tokens` [layers] in its cache."""
        self._check(tokens)
        return 2 * sum(tokens) * self.kv_heads * self.head_dim * element_size

    def _check(self, tokens: Sequence[int]) -> None:
        if len(tokens) != self.layers:
            raise ValueError(f"{len(tokens)} token counts given for a language model of {self.layers} layers")


def _ffn_macs(text: PreTrainedConfig, ffn: int, layer: int) -> int:
    experts = getattr(text, "num_experts", None) or 0
    step = getattr(text, "decoder_sparse_step", None) or 1
    if experts and layer not in (getattr(text, "mlp_only_layers", None) or ()) and (layer + 1) % step == 0:
        each = 3 * text.hidden_size * text.moe_intermediate_size
        return int(text.hidden_size * experts + text.num_experts_per_tok * each)
    return int((2 if text.model_type in PLAIN_FFN_TYPES else 3) * text.hidden_size * ffn)
