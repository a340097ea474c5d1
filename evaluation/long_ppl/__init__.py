"""LongPPL: perplexity over the tokens that need the far context (ICLR 2025, arXiv 2410.23771)."""

from evaluation.long_ppl.scoring import (
    EncodedText,
    Interval,
    encode_text,
    evaluate_long_ppl,
    find_key_intervals,
    full_context_nll,
    key_intervals,
    key_tokens,
    long_ppl_sums,
    read_key_file,
    score_document,
    short_context_nll,
    tokens_in_intervals,
    write_key_file,
)

__all__ = [
    "EncodedText",
    "Interval",
    "encode_text",
    "evaluate_long_ppl",
    "find_key_intervals",
    "full_context_nll",
    "key_intervals",
    "key_tokens",
    "long_ppl_sums",
    "read_key_file",
    "score_document",
    "short_context_nll",
    "tokens_in_intervals",
    "write_key_file",
]
