"""KV compression with sentinel tokens (arXiv 2310.08152): layout, sampler, cache, compressed contexts, generation."""

from patches.rules_kinds import OPEN, PAD, PLAIN, SLOT
from patches.sentinel.cache import EvictingCache
from patches.sentinel.context import CompressedContext, compress
from patches.sentinel.forward import masked_forward, recurrent_forward
from patches.sentinel.generation import SentinelGenerator
from patches.sentinel.layout import SpanLayout
from patches.sentinel.sampler import SpanSampler, achieved_ratio, mark_words, max_compression_ratio, sample_spans
from patches.sentinel.sentinels import Sentinels, add_sentinels, suppress

__all__ = [
    "OPEN",
    "PAD",
    "PLAIN",
    "SLOT",
    "CompressedContext",
    "EvictingCache",
    "SentinelGenerator",
    "Sentinels",
    "SpanLayout",
    "SpanSampler",
    "achieved_ratio",
    "add_sentinels",
    "compress",
    "mark_words",
    "masked_forward",
    "max_compression_ratio",
    "recurrent_forward",
    "sample_spans",
    "suppress",
]
