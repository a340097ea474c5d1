"""Models that read a shortened past: perplexity, a sweep over ratios, generation."""

from evaluation.kv_compression.exact import compression_of, entry_bytes, perplexity

__all__ = ["compression_of", "entry_bytes", "perplexity"]
