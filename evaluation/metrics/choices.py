"""Answers out of a list: classes, numbered paragraphs, counts."""

import re
from collections.abc import Sequence


def classification(prediction: str, answer: str, classes: Sequence[str]) -> float:
    """Return 1 / (number of classes that the prediction names) if the answer is among them, else 0.

    A class that is a part of the answer's own text does not count as named.
    """
    named = [name for name in classes if name in prediction and (name == answer or name not in answer)]
    return 1 / len(named) if answer in named else 0.0


def share_of_numbers(prediction: str, wanted: str) -> float:
    """Return which share of the numbers in the prediction is the wanted one."""
    numbers = re.findall(r"\d+", prediction)
    return sum(number == wanted for number in numbers) / len(numbers) if numbers else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Return which share of the predicted numbers is that of ``Paragraph N``.

    Raises:
        ValueError: the answer names no paragraph.
    """
    return paragraph_share(prediction, answer, "Paragraph ")


def paragraph_share(prediction: str, answer: str, label: str) -> float:
    """Return which share of the predicted numbers is the one behind ``label`` in the answer."""
    found = re.search(re.escape(label) + r"(\d+)", answer)
    if found is None:
        raise ValueError(f"the answer must name a paragraph as in {label + '1'!r}, got {answer!r}")
    return share_of_numbers(prediction, found[1])


def count(prediction: str, answer: str | int) -> float:
    """Return which share of the predicted numbers is the answer."""
    return share_of_numbers(prediction, str(answer))
