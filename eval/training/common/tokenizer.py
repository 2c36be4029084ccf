"""The tokenizer of the tiny models: whole words of the tasks, single letters for everything else."""

from __future__ import annotations

import string
from collections.abc import Sequence

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from .questions import NUMBERS, plural
from .scenes import ALPHABET, COLOUR_NAMES, SHAPES

PAD, BOS, EOS, UNK, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL = (PAD, BOS, EOS, UNK, IMAGE)
_WORDS = (
    "USER", "ASSISTANT", "what", "colour", "is", "the", "there", "a", "how", "many", "are", "left", "right", "of", "above",
    "below", "does", "text", "say", "yes", "no",
)  # fmt: skip

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ message['role'] | upper }}: "
    "{% if message['content'] is string %}{{ message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}<image>\n{% endif %}{% endfor %}"
    "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
    "{% endif %}"
    "{% if message['role'] == 'assistant' %}</s>{% else %} {% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""`USER: <image>\\n{question} ASSISTANT: {answer}</s>` and so on."""


def vocabulary(more: Sequence[str] = ()) -> list[str]:
    """All tokens in the order of their ids, the words `more` behind the others."""
    letters = string.ascii_letters + string.digits
    words = [*_WORDS, *COLOUR_NAMES, *SHAPES, *(plural(shape) for shape in SHAPES), *NUMBERS]
    singles = [c for c in letters if c not in words]
    return [*SPECIAL, *words, *singles, *(f"##{c}" for c in letters), *string.punctuation, *more]


def glyph_tokens() -> tuple[list[str], list[str]]:
    """Tokens of each glyph at the start of a word and inside it, in the order of the alphabet."""
    return list(ALPHABET), [f"##{c}" for c in ALPHABET]


def build_tokenizer(more: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """A word-piece tokenizer over `vocabulary` that puts `<s>` in front; `more` are further words that it knows."""
    vocab = {token: i for i, token in enumerate(vocabulary(more))}
    core = Tokenizer(
        models.WordPiece(vocab, unk_token=UNK, continuing_subword_prefix="##", max_input_chars_per_word=64)
    )
    core.normalizer = normalizers.NFC()
    core.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    core.decoder = decoders.WordPiece(prefix="##", cleanup=True)
    core.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, vocab[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        unk_token=UNK,
        extra_special_tokens={"image_token": IMAGE},
        padding_side="left",
        model_max_length=2048,
        chat_template=CHAT_TEMPLATE,
    )
