"""Evaluation of KV compression, under one name."""

from evaluation.compression_perplexity import compression_of, entry_bytes, perplexity

__all__ = ["compression_of", "entry_bytes", "perplexity"]
