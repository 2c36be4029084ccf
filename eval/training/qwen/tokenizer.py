"""tiny-llava's tokenizer with Qwen's vision tokens behind its vocabulary."""

from __future__ import annotations

from collections.abc import Sequence

from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast

from ..common.language import Prompts
from ..common.tokenizer import BOS, EOS, PAD, UNK
from ..common.tokenizer import build_tokenizer as build_base

VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
VISION = (VISION_START, VISION_END, IMAGE, VIDEO)

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% elif part['type'] == 'video' %}<|vision_start|><|video_pad|><|vision_end|>"
    "{% elif part['type'] == 'text' %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""`USER: <|vision_start|><|image_pad|><|vision_end|>{question} ASSISTANT: {answer}</s>` and so on."""


def build_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """The tokenizer; ids of tiny-llava's tokens are the same there, the words `more` and the vision tokens stand behind them."""
    base = build_base(more)
    base.add_tokens([AddedToken(token, special=True, normalized=False) for token in VISION], special_tokens=True)
    return PreTrainedTokenizerFast(
        tokenizer_object=base.backend_tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens={
            "image_token": IMAGE,
            "video_token": VIDEO,
            "vision_start_token": VISION_START,
            "vision_end_token": VISION_END,
        },
        padding_side="left",
        model_max_length=4096,
        chat_template=CHAT_TEMPLATE,
    )


class VisionPrompts(Prompts):
    """Question slots behind a picture between Qwen's vision tokens."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast) -> None:
        super().__init__(tokenizer)
        self.prefix = [*self.prefix, tokenizer.convert_tokens_to_ids(VISION_START)]
        self.suffix = [tokenizer.convert_tokens_to_ids(VISION_END)]
