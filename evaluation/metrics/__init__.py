"""Scores of predictions against answers, each in [0, 1], by the definitions of the benchmarks that use them."""

from evaluation.metrics.chinese import retrieval_zh, rouge_l_zh, token_f1_zh
from evaluation.metrics.choices import classification, count, retrieval
from evaluation.metrics.code import code_similarity, edit_similarity
from evaluation.metrics.infinitebench import infinitebench
from evaluation.metrics.rouge_l import rouge_l
from evaluation.metrics.text import (
    best,
    exact_match,
    normalize_answer,
    parse_answer,
    string_match_all,
    string_match_part,
    substring_match,
    token_f1,
)

__all__ = [
    "best",
    "classification",
    "code_similarity",
    "count",
    "edit_similarity",
    "exact_match",
    "infinitebench",
    "normalize_answer",
    "parse_answer",
    "retrieval",
    "retrieval_zh",
    "rouge_l",
    "rouge_l_zh",
    "string_match_all",
    "string_match_part",
    "substring_match",
    "token_f1",
    "token_f1_zh",
]
