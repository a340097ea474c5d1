"""Perplexity of token streams, every target once, over context lengths."""

from evaluation.perplexity.stream import evaluate_perplexity, evaluation_windows

__all__ = ["evaluate_perplexity", "evaluation_windows"]
