"""Short answers: normalised words, exact and partial matches, the line behind "Answer:"."""

import re
import string
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import Any

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)
_VERDICTS = ("yes", "no", "noanswer")


def normalize_answer(text: str) -> str:
    """Return the text in lower case, without ASCII punctuation and articles, words joined by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def overlap_f1(prediction: Sequence[Hashable], answer: Sequence[Hashable]) -> float:
    """Return ``2 p r / (p + r)`` of the items that two sequences share, counted with their repetitions."""
    shared = (Counter(prediction) & Counter(answer)).total()
    if not shared:
        return 0.0
    precision, recall = shared / len(prediction), shared / len(answer)
    return 2 * precision * recall / (precision + recall)


def token_f1(prediction: str, answer: str, *, yes_no: bool = False) -> float:
    """Return the F1 of the normalised words.

    Args:
        prediction: generated text.
        answer: one right answer.
        yes_no: score 0 where one side is yes, no or noanswer and the other is something else.
    """
    mine, right = normalize_answer(prediction), normalize_answer(answer)
    if yes_no and mine != right and (mine in _VERDICTS or right in _VERDICTS):
        return 0.0
    return overlap_f1(mine.split(), right.split())


def exact_match(prediction: str, answer: str) -> float:
    """Return 1 where the normalised texts are equal."""
    return float(normalize_answer(prediction) == normalize_answer(answer))


def substring_match(prediction: str, answer: str) -> float:
    """Return 1 where the normalised prediction contains the normalised answer."""
    return float(normalize_answer(answer) in normalize_answer(prediction))


def best(metric: Callable[[str, str], float], prediction: str, answers: Any) -> float:
    """Return the best score over answers: one text, a list of texts, or nested lists of them."""
    return max((metric(prediction, answer) for answer in _flat(answers)), default=0.0)


def _flat(answers: Any) -> Iterable[str]:
    if isinstance(answers, str):
        yield answers
        return
    for answer in answers:
        yield from _flat(answer)


def parse_answer(text: str, prefix: str = "Answer:") -> str | None:
    """Return the rest of the line behind the prefix (in any case), else the first line; None without text."""
    found = re.search(re.escape(prefix) + r"(.*)", text, re.IGNORECASE)
    if found:
        return found[1].strip()
    lines = text.strip().splitlines()
    return lines[0].strip() if lines else None


def string_match_all(prediction: str, answers: Sequence[str]) -> float:
    """Return the share of the answers that the prediction contains, in any case."""
    return sum(answer.lower() in prediction.lower() for answer in answers) / len(answers)


def string_match_part(prediction: str, answers: Sequence[str]) -> float:
    """Return 1 where the prediction contains one of the answers, in any case."""
    return float(any(answer.lower() in prediction.lower() for answer in answers))
