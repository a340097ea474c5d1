"""ROUGE by words: overlap of a text with its reference, without downloads or sentence splitting."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Hashable, Sequence
from functools import cache
from typing import Literal, get_args

from evaluation.rouge.published_bpe import published_scores

Variant = Literal["word", "published_bpe"]
NAMES = ("rouge1", "rouge2", "rougeL")
WORDS = re.compile(r"[a-z0-9]+")
# Shorter words are their own stems.
STEMMED_LETTERS = 4


def rouge(
    predictions: Sequence[str], references: Sequence[str], *, variant: Variant = "word", stemmer: bool = False
) -> dict[str, float]:
    """Return the mean F1 of ROUGE-1, ROUGE-2 and ROUGE-L over pairs of texts.

    Args:
        predictions: texts to score.
        references: one for each.
        variant: ``word``: words are runs of ``[a-z0-9]`` of the lower-case text; counts of n-grams are clipped, the
            longest common subsequence runs over the whole text. ``published_bpe``: texts are byte-pair tokens joined
            by blanks, scored as the published evaluation of DRT does (`evaluation.rouge.published_bpe`).
        stemmer: replace words of more than three letters by their Porter stems (needs nltk).

    Returns:
        ``rouge1``, ``rouge2``, ``rougeL``, each in [0, 1]. A text without words scores 0.

    Raises:
        ValueError: lists of different lengths or empty ones, another variant, stems of byte-pair tokens, or stems
            without nltk.
    """
    if len(predictions) != len(references) or not predictions:
        raise ValueError(f"each text needs one reference, got {len(predictions)} texts and {len(references)}")
    pairs = zip(predictions, references, strict=True)
    scores = [pair_scores(*pair, variant=variant, stemmer=stemmer) for pair in pairs]
    return {name: math.fsum(score[name] for score in scores) / len(scores) for name in NAMES}


def pair_scores(
    prediction: str, reference: str, *, variant: Variant = "word", stemmer: bool = False
) -> dict[str, float]:
    """Return the F1 of one text, see `rouge`."""
    if variant not in get_args(Variant):
        raise ValueError(f"variant is word or published_bpe, got {variant!r}")
    if variant == "published_bpe":
        if stemmer:
            raise ValueError("stemmer=True has no effect on variant=published_bpe, leave it out")
        return published_scores(prediction, reference)
    mine, wanted = _words(prediction, stemmer=stemmer), _words(reference, stemmer=stemmer)
    scores = {}
    for size, name in ((1, "rouge1"), (2, "rouge2")):
        ours, theirs = _ngrams(mine, size), _ngrams(wanted, size)
        scores[name] = _f1((ours & theirs).total(), ours.total(), theirs.total())
    scores["rougeL"] = _f1(longest_common_subsequence(mine, wanted), len(mine), len(wanted))
    return scores


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


def _words(text: str, *, stemmer: bool) -> list[str]:
    words = WORDS.findall(text.lower())
    return [_stem()(word) if len(word) >= STEMMED_LETTERS else word for word in words] if stemmer else words


@cache
def _stem() -> Callable[[str], str]:
    try:
        from nltk.stem.porter import PorterStemmer
    except ModuleNotFoundError as error:
        raise ValueError("stemmer=True needs nltk: pip install nltk, or compare words (stemmer=False)") from error
    stem: Callable[[str], str] = PorterStemmer().stem
    return stem


def _ngrams(words: Sequence[str], size: int) -> Counter[tuple[str, ...]]:
    return Counter(zip(*(words[start:] for start in range(size)), strict=False))


def _f1(overlap: int, num_predicted: int, num_wanted: int) -> float:
    return 2 * overlap / (num_predicted + num_wanted) if overlap else 0.0
