"""Attention over a prefix, pieces and own tokens, with its statistics; and the exact merge of disjoint key sets.

Legend: B batch, H heads, G kv heads, T query tokens, N key slots, D head size, K pieces.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from patches.parallel_context.key_groups import KeyPart, count_groups
from patches.parallel_context.options import APE, SelectiveAttention
from patches.parallel_context.policies import aggregate_scores
from patches.parallel_context.problem import Own, Problem
from patches.parallel_context.tiled import attend_tiled, collect_scores

__all__ = ["GroupedOutput", "aggregate_scores", "grouped_attention", "merge_attention"]


@dataclass(frozen=True)
class GroupedOutput:
    """Output and statistics of `grouped_attention`; all but the output are float32 or better."""

    output: Tensor
    """``[B, H, T, D]`` in the dtype of the query."""
    lse: Tensor
    """``[B, H, T]``, natural logarithm, after hard selection and APE."""
    entropy: Tensor
    """``[B, H, T]`` in nats, over all visible keys, after every policy."""
    group_scores: Tensor
    """``[B, H, T, K]`` before selection."""
    group_mass: Tensor
    """``[B, H, T, K + 2]``: sums of weights on prefix, pieces 1 .. K, own tokens, after every policy."""


def grouped_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    segments: Tensor,
    *,
    scale: float,
    selection: SelectiveAttention | None = None,
    ape: APE | None = None,
    softcap: float | None = None,
    scores: Tensor | None = None,
    own: int | None = None,
) -> GroupedOutput:
    """Attend from query tokens to a prefix, pieces and own tokens under a policy.

    Plain: ``softmax_j(scale q . k_j)`` over the visible keys. Hard selection leaves out the keys of all but the best
    pieces; soft selection gives the pieces shares of their common mass; APE tempers the logits of the pieces.

    Args:
        query: ``[B, H, T, D]``.
        key: ``[B, G, N, D]``, H a multiple of G; never repeated.
        value: ``[B, G, N, D]``.
        segments: ``[N]``, ``[B, N]`` or ``[B, G, N]`` integers: 0 prefix, 1 .. K pieces, -1 own, -2 invisible.
        scale: Factor of the scores.
        selection: Selective attention; its scores are aggregated over all T query tokens of a row.
        ape: Adaptive temperature of the pieces; not with soft selection.
        softcap: ``softcap tanh(x / softcap)`` on the scaled scores.
        scores: Aggregated piece scores, broadcastable to ``[B, H, T, K]``, that replace those found here.
        own: The last ``own`` keys are the query tokens themselves, causal (lower right); None: T. 0: every key is
            visible to every query token, as in a shard of a context.

    Returns:
        Output and statistics.

    Raises:
        ValueError: On shapes that do not fit, or options that exclude each other.
    """
    own = query.shape[2] if own is None else own
    segments = _check(query, key, value, segments, own)
    if ape is not None and selection is not None and selection.soft_temperature is not None:
        raise ValueError("APE and soft selection both reweigh the pieces; choose one")
    problem = _problem(query, key, value, segments, own, scale)
    problem = _with_policy(problem, selection, ape, softcap, scores)
    found = attend_tiled(problem, frozenset({"entropy", "mass", "group_scores"}))
    assert found.entropy is not None and found.group_scores is not None and found.mass is not None
    return GroupedOutput(found.output, found.lse, found.entropy, found.group_scores, found.mass)


def merge_attention(outputs: Sequence[Tensor], lses: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """Merge attention over disjoint key sets: ``sum_i exp(lse_i - lse) o_i`` with ``lse = logsumexp_i lse_i``.

    Args:
        outputs: Outputs ``[B, H, T, D]``, one per key set.
        lses: Their log-sum-exps ``[B, H, T]``; -inf for an empty set.

    Returns:
        The output and log-sum-exp of the union.
    """
    if not len(outputs) or len(outputs) != len(lses):
        raise ValueError(f"expected as many outputs as log-sum-exps, at least one, got {len(outputs)} and {len(lses)}")
    stacked = torch.stack(tuple(lses))
    total = torch.logsumexp(stacked, 0)
    merged = torch.zeros_like(outputs[0], dtype=stacked.dtype)
    for output, lse in zip(outputs, stacked, strict=True):
        merged += (lse - total).exp().nan_to_num_(0.0)[..., None] * output
    return merged.to(outputs[0].dtype), total


def _check(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, own: int) -> Tensor:
    """Check shapes; returns the segments as ``[B, G or 1, N]``."""
    if query.dim() != 4 or key.dim() != 4 or key.shape != value.shape or query.shape[0] != key.shape[0]:
        raise ValueError(
            "expected query [B, H, T, D], key and value [B, G, N, D], got "
            f"{list(query.shape)}, {list(key.shape)}, {list(value.shape)}"
        )
    if query.shape[3] != key.shape[3] or query.shape[1] % key.shape[1]:
        raise ValueError(f"query {list(query.shape)} does not fit keys {list(key.shape)}: head size or number of heads")
    batch, heads, slots = key.shape[:3]
    if segments.dim() == 2:
        segments = segments[:, None]
    if segments.is_floating_point() or segments.shape not in ((slots,), (batch, 1, slots), (batch, heads, slots)):
        raise ValueError(f"segments must be integers [N], [B, N] or [B, G, N], got {list(segments.shape)}")
    if not 0 <= own <= slots:
        raise ValueError(f"own must lie in 0 .. {slots}, the number of keys, got {own}")
    return segments.expand(batch, 1, slots) if segments.dim() == 1 else segments


def _problem(query: Tensor, key: Tensor, value: Tensor, segments: Tensor, own: int, scale: float) -> Problem:
    cut = key.shape[2] - own
    context, last = segments[..., :cut], segments[..., cut:]
    # Per-head marks of unused own slots would need one mask per head; the query tokens are the same for all heads.
    valid = (last != -2).all(1)
    pieces = [int(row) for row in context.flatten(1).max(-1).values] if cut else [0] * len(query)
    pieces = [max(number, 0) for number in pieces]
    keys, values = key[:, :, :cut], value[:, :, :cut]
    rank = torch.where(context == -1, max(pieces) + 1, context)
    rank = torch.where(context < -1, max(pieces) + 2, rank)
    if (rank[..., 1:] < rank[..., :-1]).any():
        order = torch.sort(rank, dim=-1, stable=True).indices
        context = context.gather(-1, order)
        index = order.expand(*keys.shape[:3])[..., None].expand(keys.shape)
        keys, values = keys.gather(2, index), values.gather(2, index)
    part = KeyPart(keys, values, count_groups(context, max(pieces)))
    own_keys = Own(key[:, :, cut:], value[:, :, cut:], valid=None if valid.all() else valid)
    return Problem(query, (part,), own_keys, scale=scale, num_pieces=tuple(pieces))


def _with_policy(
    problem: Problem,
    selection: SelectiveAttention | None,
    ape: APE | None,
    softcap: float | None,
    scores: Tensor | None,
) -> Problem:
    batch, heads, tokens, _ = problem.query.shape
    problem = replace(problem, selection=selection, ape=ape, softcap=softcap)
    if scores is not None:
        full = (batch, heads, tokens, problem.most_pieces)
        return replace(problem, scores=scores.expand(full))
    if selection is not None and selection.aggregate:
        found = collect_scores(problem, selection.score_top_k)
        shared = aggregate_scores(found, selection.aggregate, selection.aggregate_top_k)
        return replace(problem, scores=shared)
    return problem
