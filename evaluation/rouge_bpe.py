"""ROUGE as the published evaluation of DRT computes it: over byte-pair tokens, sets instead of counts.

Notable: these numbers are for comparison with the published ones only. A token is a word, n-grams count once however
often they come, and a subsequence is sought between every two sentences.
"""

from __future__ import annotations

from collections.abc import Sequence

EPSILON = 1e-8


def published_scores(prediction: str, reference: str) -> dict[str, float]:
    """Return ``rouge1``, ``rouge2`` and ``rougeL`` of byte-pair tokens joined by blanks.

    ``F = 2 p r / (p + r + 1e-8)`` with p and r over the numbers of distinct n-grams (rougeL: words). The overlap of
    rougeL is the number of distinct words that lie on a longest common subsequence of any two sentences.
    """
    mine, wanted = _sentences(prediction), _sentences(reference)
    scores = {}
    for size in (1, 2):
        ours, theirs = _ngrams(mine, size), _ngrams(wanted, size)
        scores[f"rouge{size}"] = _f1(len(ours & theirs), len(ours), len(theirs))
    common: set[str] = set()
    for theirs_sentence in wanted:
        for our_sentence in mine:
            common |= _common_words(our_sentence, theirs_sentence)
    scores["rougeL"] = _f1(len(common), len(_ngrams(mine, 1)), len(_ngrams(wanted, 1)))
    return scores


def _sentences(text: str) -> list[list[str]]:
    """Split at full stops; a sentence of nothing but blanks is one empty word, as published."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _ngrams(sentences: list[list[str]], size: int) -> set[tuple[str, ...]]:
    words = [word for sentence in sentences for word in sentence]
    return set(zip(*(words[start:] for start in range(size)), strict=False))


def _common_words(prediction: Sequence[str], reference: Sequence[str]) -> set[str]:
    """Return the words on one longest common subsequence: from the end, stepping back in the prediction first."""
    table = [[0] * (len(prediction) + 1) for _ in range(len(reference) + 1)]
    for i, wanted in enumerate(reference, 1):
        for j, word in enumerate(prediction, 1):
            table[i][j] = table[i - 1][j - 1] + 1 if wanted == word else max(table[i - 1][j], table[i][j - 1])
    found, i, j = set(), len(reference), len(prediction)
    while i and j:
        if reference[i - 1] == prediction[j - 1]:
            found.add(reference[i - 1])
            i, j = i - 1, j - 1
        elif table[i - 1][j] > table[i][j - 1]:
            i -= 1
        else:
            j -= 1
    return found


def _f1(overlap: int, num_predicted: int, num_wanted: int) -> float:
    if not (num_predicted and num_wanted):
        return 0.0
    precision, recall = overlap / num_predicted, overlap / num_wanted
    return 2 * precision * recall / (precision + recall + EPSILON)
