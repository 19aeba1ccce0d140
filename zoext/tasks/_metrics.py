"""How a generated answer is compared with references: exact match and F1 of SQuAD (arXiv 1606.05250)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalized(text: str) -> str:
    """In lower case, without punctuation, articles and superfluous spaces, as SQuAD compares answers."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, references: Sequence[str]) -> float:
    """1 if ``answer`` equals one of the references after ``normalized``, and else 0.

    >>> zoext.tasks.exact_match("The Eiffel Tower.", ["Eiffel tower", "tower"])
    1.0
    """
    return float(any(normalized(answer) == normalized(reference) for reference in references))


def f1(answer: str, references: Sequence[str]) -> float:
    """The harmonic mean of precision and recall of the words of ``answer``; of the best reference.

    >>> zoext.tasks.f1("the tall tower", ["Eiffel tower"])
    0.5
    """
    return max(
        (_f1(normalized(answer).split(), normalized(each).split()) for each in references), default=0.0
    )


def _f1(answer: list[str], reference: list[str]) -> float:
    if not answer or not reference:  # neither has words, as "no answer" of SQuAD 2 may be
        return float(answer == reference)
    shared = sum((Counter(answer) & Counter(reference)).values())
    return 2 * shared / (len(answer) + len(reference))
