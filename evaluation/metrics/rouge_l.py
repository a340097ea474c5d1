"""ROUGE-L at the level of a summary, with the values of the ``rouge`` 1.0.1 package.

Notable: that package is no longer kept, so its rule is written out: sentences end at ".", the words that any pair of
sentences has in common (in order) are put together as a set, and precision and recall count distinct words.
"""

from collections.abc import Sequence

import numpy as np

EPSILON = 1e-8


def rouge_l(prediction: str, answer: str) -> float:
    """Return ``2 p r / (p + r + 1e-8)``, p and r the shares of distinct words in the union of common subsequences."""
    mine, right = sentences(prediction), sentences(answer)
    words, wanted = {word for s in mine for word in s}, {word for s in right for word in s}
    if not words or not wanted:
        return 0.0
    common = {word for one in right for two in mine for word in common_words(one, two)}
    precision, recall = len(common) / len(words), len(common) / len(wanted)
    return 2 * precision * recall / (precision + recall + EPSILON)


def sentences(text: str) -> list[list[str]]:
    """Split at full stops; a sentence of nothing but blanks is one empty word, as in the package."""
    return [" ".join(sentence.split()).split(" ") for sentence in text.split(".") if sentence]


def common_words(one: Sequence[str], two: Sequence[str]) -> set[str]:
    """Return the words of a longest common subsequence; of several, the one that drops the end of ``two`` first."""
    if not set(one) & set(two):
        return set()
    table = _lengths(one, two)
    found: set[str] = set()
    i, j = len(one), len(two)
    while i and j:
        if one[i - 1] == two[j - 1]:
            found.add(one[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1, j] > table[i, j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _lengths(one: Sequence[str], two: Sequence[str]) -> np.ndarray:
    """Return the lengths of the longest common subsequences of all pairs of beginnings."""
    numbers = {word: number for number, word in enumerate(dict.fromkeys([*one, *two]))}
    right = np.array([numbers[word] for word in two])
    table = np.zeros((len(one) + 1, len(two) + 1), dtype=np.int32)
    for i, word in enumerate(one, 1):
        # A match lengthens what stands before it; a row never falls from left to right.
        matched = np.where(right == numbers[word], table[i - 1, :-1] + 1, table[i - 1, 1:])
        table[i, 1:] = np.maximum.accumulate(matched)
    return table
