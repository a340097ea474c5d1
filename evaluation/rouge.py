"""ROUGE by words: overlap of a text with its reference, without downloads, stemming or sentence splitting."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Sequence
from typing import Literal

WORDS = re.compile(r"[a-z0-9]+")


def rouge(
    predictions: Sequence[str], references: Sequence[str], *, variant: Literal["word"] = "word"
) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over pairs of texts.

    Args:
        predictions: texts to score.
        references: one for each.
        variant: ``word``: words are runs of ``[a-z0-9]`` of the lower-case text; counts of n-grams are clipped, the
            longest common subsequence runs over the whole text.

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, each in [0, 1]. A text without words scores 0.

    Raises:
        ValueError: lists of different lengths or empty ones, or another variant.
    """
    if variant != "word":
        raise ValueError(f"variant is word, got {variant!r}")
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"each text needs one reference, got {len(predictions)} texts and {len(references)}")
    sums = {"rouge1": 0.0, "rouge2": 0.0, "rougeL": 0.0}
    for prediction, reference in zip(predictions, references, strict=True):
        mine, wanted = WORDS.findall(prediction.lower()), WORDS.findall(reference.lower())
        for size, name in ((1, "rouge1"), (2, "rouge2")):
            ours, theirs = _ngrams(mine, size), _ngrams(wanted, size)
            sums[name] += _f1((ours & theirs).total(), ours.total(), theirs.total())
        sums["rougeL"] += _f1(longest_common_subsequence(mine, wanted), len(mine), len(wanted))
    return {name: value / len(predictions) for name, value in sums.items()}


def longest_common_subsequence(one: Sequence[Hashable], two: Sequence[Hashable]) -> int:
    """Return the length of the longest common subsequence.

    ``L[i, j] = L[i - 1, j - 1] + 1`` where the items are equal, else ``max(L[i - 1, j], L[i, j - 1])``, row by row.
    """
    row = [0] * (len(two) + 1)
    for item in one:
        diagonal = 0
        for place, other in enumerate(two, 1):
            above = row[place]
            row[place] = diagonal + 1 if item == other else max(above, row[place - 1])
            diagonal = above
    return row[-1]


def _ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def _f1(overlap: int, num_predicted: int, num_wanted: int) -> float:
    return 2 * overlap / (num_predicted + num_wanted) if overlap else 0.0
