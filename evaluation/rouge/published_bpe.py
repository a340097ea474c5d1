"""ROUGE as the published evaluation of DRT computes it: over byte-pair tokens, sets instead of counts.

Notable: these numbers are for comparison with the published ones only. A token is a word, n-grams count once however
often they come, and a subsequence is sought between every two sentences.
"""

from __future__ import annotations

from evaluation.metrics.rouge_l import EPSILON, rouge_l, sentences


def published_scores(prediction: str, reference: str) -> dict[str, float]:
    """Return ``rouge1``, ``rouge2`` and ``rougeL`` of byte-pair tokens joined by blanks.

    ``F = 2 p r / (p + r + 1e-8)`` with p and r over the numbers of distinct n-grams (rougeL: words). The overlap of
    rougeL is the number of distinct words that lie on a longest common subsequence of any two sentences: that of
    LongBench, see `evaluation.metrics.rouge_l`.
    """
    mine, wanted = sentences(prediction), sentences(reference)
    scores = {}
    for size in (1, 2):
        ours, theirs = _ngrams(mine, size), _ngrams(wanted, size)
        scores[f"rouge{size}"] = _f1(len(ours & theirs), len(ours), len(theirs))
    return scores | {"rougeL": rouge_l(prediction, reference)}


def _ngrams(parts: list[list[str]], size: int) -> set[tuple[str, ...]]:
    words = [word for part in parts for word in part]
    return set(zip(*(words[start:] for start in range(size)), strict=False))


def _f1(overlap: int, num_predicted: int, num_wanted: int) -> float:
    if not (num_predicted and num_wanted):
        return 0.0
    precision, recall = overlap / num_predicted, overlap / num_wanted
    return 2 * precision * recall / (precision + recall + EPSILON)
