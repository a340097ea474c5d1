"""Perplexity of token streams, every target once, over context lengths."""

from evaluation.perplexity.reading import Reading, evaluation_windows
from evaluation.perplexity.stream import evaluate_perplexity, score_stream

__all__ = ["Reading", "evaluate_perplexity", "evaluation_windows", "score_stream"]
