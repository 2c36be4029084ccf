"""The question of a prompt as plain words."""

from __future__ import annotations

import re

# What benchmarks append to a question, which says nothing of the picture.
ANSWER_FORMATS = (
    "Answer the question using a single word or phrase.",
    "Answer with the option's letter from the given choices directly.",
)
# MMTok's list: articles, forms of "be", "have" and "do", pronouns, question words, and some that join.
COMMON_WORDS = frozenset(
    re.findall(
        r"\w+",
        "a an the is are was were be been being have has had do does did it they he she we you i what where when why how "
        "who which and or but so if then question answer to for with by from at into onto upon",
    )
)
_ROLE = re.compile(r"\s*(?:\bASSISTANT\s*:?|\bassistant)\s*$")


def question_text(prompt: str) -> str:
    """Return a prompt's text without a role name at its end and without the sentences that ask for a form of answer."""
    text = _ROLE.sub("", prompt)
    for sentence in ANSWER_FORMATS:
        text = text.replace(sentence, "")
    return text.strip()


def keywords(text: str) -> str:
    """Return the words of a question that are not common ones, joined by blanks; all of the text where none is left."""
    for sentence in ANSWER_FORMATS:
        text = text.replace(sentence, "")
    text = text.strip()
    words = [word for word in re.findall(r"\b\w+\b", text) if word.lower() not in COMMON_WORDS]
    return " ".join(words) or text
