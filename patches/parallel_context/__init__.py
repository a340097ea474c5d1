"""Parallel context encoding (arXiv 2412.16545, 2502.14317): pieces encoded apart, read by one query.

with ParallelContext(degree=8).bind(model, tokenizer) as pc:
    state = pc.encode(pieces)
    print(pc.score(state, query_ids).perplexity)
"""

from patches.parallel_context.attention import GroupedOutput, aggregate_scores, grouped_attention, merge_attention
from patches.parallel_context.baselines import baseline
from patches.parallel_context.cache import PieceCache, key_norms, value_norms
from patches.parallel_context.calibration import Calibration
from patches.parallel_context.eviction import TokenEviction, observation_scores, pyramid_budgets
from patches.parallel_context.options import APE, KeepPieces, SelectiveAttention
from patches.parallel_context.patch import ParallelContext
from patches.parallel_context.positions import positions
from patches.parallel_context.splitting import split_context

__all__ = [
    "APE",
    "Calibration",
    "GroupedOutput",
    "KeepPieces",
    "ParallelContext",
    "PieceCache",
    "SelectiveAttention",
    "TokenEviction",
    "aggregate_scores",
    "baseline",
    "grouped_attention",
    "key_norms",
    "merge_attention",
    "observation_scores",
    "positions",
    "pyramid_budgets",
    "split_context",
    "value_norms",
]
