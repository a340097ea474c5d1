"""ROUGE-1, -2 and -L of texts against references, of words or, as published, of pieces of a tokenizer."""

from evaluation.rouge.score import NAMES, longest_common_subsequence, pair_scores, rouge

__all__ = ["NAMES", "longest_common_subsequence", "pair_scores", "rouge"]
