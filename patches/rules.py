"""Attention rules: which key a query sees, written once and used as dense mask, flex `mask_mod` and mask function.

A rule is a function ``rule(batch, head, query, key) -> bool`` of index tensors, scalars under vmap or tensors that
broadcast. It has no data-dependent branch. Every rule is causal except `documents`, which is meant for `intersect`.

Legend: B batch, S columns.
"""

import random

import torch
from torch import Tensor

from patches.rules_dense import Rule, dense_mask, index_mask
from patches.rules_form import as_attention_mask
from patches.rules_kinds import PLAIN, SLOT, Spans, last_seen

__all__ = [
    "Rule",
    "as_attention_mask",
    "causal",
    "dense_mask",
    "documents",
    "index_mask",
    "intersect",
    "local",
    "scattered",
    "scattered_keep",
    "sentinel",
    "streaming",
]


def causal() -> Rule:
    """Return the rule ``key <= query``."""

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return key <= query

    return visible


def sentinel(layout: Spans) -> Rule:
    """Return the rule of rows with sentinels (arXiv 2310.08152).

    Visible, for ``key <= query``: the query itself; to a plain query slots that are not forgotten, plain keys outside
    closed spans and those of spans that are closed only later, its own for one; to a slot everything of its own span.
    So nobody but its slots sees an opening sentinel, a slot sees neither other slots nor the context, and a pad sees
    itself.

    Args:
        layout: Anything with ``kind`` and ``span`` ``[B, S]``, and ``forget`` if slots end.
    """
    kind, span, end = layout.kind, layout.span, last_seen(layout)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        query_kind, query_span = kind[batch, query], span[batch, query]
        key_kind, key_span = kind[batch, key], span[batch, key]
        context = ((key_kind == SLOT) | (key_kind == PLAIN)) & (query <= end[batch, key])
        seen = ((query_kind == PLAIN) & context) | ((query_kind == SLOT) & (query_span > 0) & (query_span == key_span))
        return ((key == query) | seen) & (key <= query)

    return visible


def local(compression_ratio: float) -> Rule:
    """Return the rule ``int(query * ratio) <= key <= query``: each query forgets the first part of its past.

    Args:
        compression_ratio: Fraction of the past that is removed, in [0, 1).
    """
    _check_ratio(compression_ratio)

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        # An integer tensor times a float is float32, too coarse: 90 * 0.7 would give 63 instead of 62.
        first = (query.to(torch.float64) * compression_ratio).to(torch.int64)
        return (key >= first) & (key <= query)

    return visible


def scattered(keep: Tensor) -> Rule:
    """Return the rule that shows the kept keys, and each query itself.

    Args:
        keep: bool ``[S]`` or ``[B, S]``.
    """
    if keep.dtype != torch.bool or keep.dim() not in (1, 2):
        raise ValueError(f"keep must be a bool tensor [S] or [B, S], got {keep.dtype} {list(keep.shape)}")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        kept = keep[key] if keep.dim() == 1 else keep[batch, key]
        return (kept | (key == query)) & (key <= query)

    return visible


def streaming(num_sinks: int, window_size: int) -> Rule:
    """Return the rule of attention sinks and a sliding window (StreamingLLM).

    Args:
        num_sinks: First tokens of a row, always visible.
        window_size: Keys to the left, the query included.
    """
    if num_sinks < 0 or window_size < 1:
        raise ValueError(f"streaming needs num_sinks >= 0 and window_size >= 1, got {num_sinks} and {window_size}")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return ((key < num_sinks) | (query - key < window_size)) & (key <= query)

    return visible


def documents(document_ids: Tensor) -> Rule:
    """Return the rule "same document"; it is not causal, intersect it with one that is.

    Args:
        document_ids: ``[B, S]`` integers.
    """

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return document_ids[batch, query] == document_ids[batch, key]

    return visible


def intersect(*rules: Rule) -> Rule:
    """Return the rule that shows what all given rules show."""
    if not rules:
        raise ValueError("intersect needs at least one rule")

    def visible(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        seen = rules[0](batch, head, query, key)
        for rule in rules[1:]:
            seen = seen & rule(batch, head, query, key)
        return seen

    return visible


def scattered_keep(
    batch_size: int,
    num_tokens: int,
    compression_ratio: float,
    *,
    generator: torch.Generator | random.Random,
    exact: bool = True,
    protect_head: int = 0,
) -> Tensor:
    """Draw the keys that `scattered` shows; returns bool ``[B, S]`` on the CPU.

    Args:
        batch_size: Rows, drawn independently.
        num_tokens: Columns of a row.
        compression_ratio: Fraction that is removed, in [0, 1).
        generator: Source of randomness, on the CPU.
        exact: Keep ``floor((1 - ratio) * S + 0.5)`` tokens, drawn without replacement; else each with probability
            ``1 - ratio``, as published.
        protect_head: First tokens that are always kept; with `exact` they count.

    Raises:
        ValueError: if the ratio lies outside [0, 1) or keeps fewer tokens than are protected.
    """
    _check_ratio(compression_ratio)
    if isinstance(generator, random.Random):
        generator = torch.Generator().manual_seed(generator.getrandbits(63))
    draws = torch.rand(batch_size, num_tokens, generator=generator, dtype=torch.float64)
    draws[:, :protect_head] = -1.0
    if not exact:
        return draws < 1 - compression_ratio
    num_kept = int((1 - compression_ratio) * num_tokens + 0.5)
    if num_kept < min(protect_head, num_tokens):
        raise ValueError(
            f"ratio {compression_ratio} keeps {num_kept} of {num_tokens} tokens, "
            f"fewer than the {protect_head} protected; lower one of them"
        )
    keep = torch.zeros(batch_size, num_tokens, dtype=torch.bool)
    return keep.scatter_(1, draws.argsort(dim=1)[:, :num_kept], True)


def _check_ratio(compression_ratio: float) -> None:
    if not 0 <= compression_ratio < 1:
        raise ValueError(f"compression_ratio is the fraction removed, in [0, 1), got {compression_ratio}")
