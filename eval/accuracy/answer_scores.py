"""How an answer of free text is scored against what a user wrote down as right."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal

from vlmprune.errors import unknown

Scoring = Literal["auto", "exact", "contains", "choice", "anls"]
SCORINGS = ("auto", "exact", "contains", "choice", "anls")
ANLS_THRESHOLD = 0.5


def check_scoring(name: str) -> None:
    """Raise UnknownNameError unless `name` is a way of scoring."""
    if name not in SCORINGS:
        raise unknown("--score", name, SCORINGS)


def normalised(text: str) -> str:
    """Lower case, one space between words, no punctuation at the ends of words."""
    words = (word.strip(".,;:!?\"'()[]") for word in text.lower().split())
    return " ".join(word for word in words if word)


def score_answer(answer: str, right: Sequence[str], choices: Sequence[str] = (), scoring: str = "auto") -> float:
    """Score an answer between 0 and 1.

    Args:
        answer: what the model said.
        right: what is right; the best match counts.
        choices: what it had to choose from, for "choice": by its text, or by its letter (A for the first).
        scoring: "exact" (the same words), "contains" (the right words occur in a row), "choice", "anls" (normalised Levenshtein
            similarity, 0 below one half, as DocVQA and TextVQA do), or "auto" (choice where there are choices, else contains).
    """
    check_scoring(scoring)
    kind = ("choice" if choices else "contains") if scoring == "auto" else scoring
    if kind == "choice":
        chosen = chosen_choice(answer, choices)
        return float(chosen is not None and any(normalised(choices[chosen]) == normalised(each) for each in right))
    if kind == "anls":
        return max(anls(normalised(answer), normalised(each)) for each in right)
    said = normalised(answer)
    if kind == "exact":
        return float(any(said == normalised(each) for each in right))
    return float(any(f" {normalised(each)} " in f" {said} " for each in right))


def chosen_choice(answer: str, choices: Sequence[str]) -> int | None:
    """Which of the choices an answer names, by its text or by a letter alone or at the start ("B", "(b) red"), if any."""
    said = normalised(answer)
    named = [place for place, choice in enumerate(choices) if f" {normalised(choice)} " in f" {said} "]
    if named:
        return max(named, key=lambda place: len(choices[place]))
    letter = re.match(r"\(?([A-Za-z])\)?(?:[.:)\s]|$)", answer.strip())
    place = ord(letter[1].upper()) - ord("A") if letter else len(choices)
    return place if place < len(choices) else None


def anls(said: str, right: str) -> float:
    """One minus the edit distance over the longer length; 0 where that is below one half."""
    longest = max(len(said), len(right))
    similarity = 1.0 - edit_distance(said, right) / longest if longest else 1.0
    return similarity if similarity >= ANLS_THRESHOLD else 0.0


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and replacements from one text to the other."""
    row = list(range(len(second) + 1))
    for number, mark in enumerate(first, start=1):
        before, row[0] = row[0], number
        for place, other in enumerate(second, start=1):
            before, row[place] = row[place], min(row[place] + 1, row[place - 1] + 1, before + (mark != other))
    return row[-1]
