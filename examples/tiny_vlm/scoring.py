"""Exact match of the image-dependent words of an answer."""

from __future__ import annotations

import re
from dataclasses import dataclass

from .dataset import strip_marks

_SENTENCE = re.compile(r"[^.?!]+[.?!]?")
NOT_COUNTED = "{a}"


@dataclass
class Score:
    """Running counts."""

    items: int = 0
    right: int = 0
    answers: int = 0
    exact: int = 0

    def add(self, other: Score) -> None:
        self.items += other.items
        self.right += other.right
        self.answers += other.answers
        self.exact += other.exact

    def as_dict(self) -> dict[str, float | int]:
        return {
            "content_items": self.items,
            "content_exact_match": round(self.right / max(self.items, 1), 4),
            "answers": self.answers,
            "whole_answer_exact_match": round(self.exact / max(self.answers, 1), 4),
        }


def _words(text: str) -> list[list[str]]:
    """Words of every sentence, with punctuation removed."""
    return [sentence.strip(" .?!").replace(",", "").split() for sentence in _SENTENCE.findall(text)]


def score_answer(reference: str, generated: str) -> Score:
    """Strict: an item counts only at the same word of the same sentence."""
    gold, guess = _words(reference), _words(generated)
    score = Score(answers=1, exact=int(strip_marks(reference).strip() == generated.strip()))
    for i, sentence in enumerate(gold):
        said = guess[i] if i < len(guess) else []
        for j, word in enumerate(sentence):
            if word.startswith("{") and word != NOT_COUNTED:
                score.items += 1
                score.right += j < len(said) and said[j] == word.strip("{}")
    return score
